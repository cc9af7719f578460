"""Runs main.py of the working folder, and says on a pipe of its own whether it came to its end.

Started as `python -c SOURCE secret_fd verdict_fd`. The nonce waits unread in the secret pipe while the program runs, so
it is in no variable that the program could look up; one that searches its own file descriptors can still find it.
"""

import os
import sys


def main() -> None:
    """Exit status 0 and the nonce on the verdict pipe, or status 1 and the reason there."""
    secret, verdict = int(sys.argv[1]), int(sys.argv[2])
    read, write, leave = os.read, os.write, os._exit  # the program may replace what the modules hold
    sys.argv[:] = ["main.py"]
    module = type(sys)("__main__")
    module.__file__ = "main.py"
    sys.modules["__main__"] = module
    try:
        with open("main.py", "rb") as file:
            code = compile(file.read(), "main.py", "exec", dont_inherit=True)
        exec(code, module.__dict__)
    except BaseException as error:
        kind = type(error).__name__
        write(verdict, b"M" if isinstance(error, MemoryError) else b"E")
        try:
            sys.stdout.flush()
            reason = f"{kind}: {error}"[:300].encode("utf-8", "replace")
        except BaseException:  # an exception whose text raises
            reason = kind.encode("utf-8", "replace")
        write(verdict, reason)
        leave(1)
    write(verdict, read(secret, 64))


if __name__ == "__main__":
    main()
