"""Turn a dense open code model into a stronger, cheaper mixture of experts.

Packages: `models`, `transforms`, `distillation`, `data`, `training`, `checkpoints`, `inference`, `evaluation`.
The two modules beside them, `errors` and `files`, are the ground that every package may stand on.
"""
