import collections
import json
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kwaicoder_jax import data
from kwaicoder_jax.data import loader as loading
from kwaicoder_jax.data import mixing
from kwaicoder_jax.errors import UserError

MIXTURE = {"code": 0.6, "mathematics": 0.4}
PHASES = [
    data.PhaseSpec(5, 8, 64, MIXTURE, data.FimOptions(rate=0.5)),
    data.PhaseSpec(4, 4, 160, {"code": 1.0, "tiny": 3.0}, data.FimOptions(rate=0.0)),
    data.PhaseSpec(7, 12, 96, {"mathematics": 0.2, "tiny": 0.3, "code": 0.5}, data.FimOptions(rate=1.0, unit="line")),
]
STEPS = sum(p.steps for p in PHASES)
KEYS = {"inputs", "targets", "segment_ids", "positions", "loss_mask"}


def loader(corpus, phases=PHASES, seed=5, streams=4, **more):
    return data.TrainingLoader(corpus, phases, seed=seed, streams=streams, **more)


def same(a, b):
    assert a.keys() == b.keys() == KEYS
    for key in KEYS:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key])


@pytest.fixture(scope="module")
def undisturbed(corpus):
    """All batches of a run, and the states before each and at the end, as a checkpoint would hold them."""
    run = loader(corpus)
    states, batches = [json.dumps(run.get_state())], []
    for batch in run:
        batches.append(batch)
        states.append(json.dumps(run.get_state()))
    return batches, states


def segments(batches):
    """(inputs, targets) of each packed example, as lists."""
    for batch in batches:
        for row in range(len(batch["inputs"])):
            ids = batch["segment_ids"][row]
            for segment in range(1, ids.max() + 1):
                where = ids == segment
                yield batch["inputs"][row][where].tolist(), batch["targets"][row][where].tolist()


def test_shapes_and_end(undisturbed):
    batches, _ = undisturbed
    assert len(batches) == STEPS
    step = 0
    for phase in PHASES:
        for _ in range(phase.steps):
            for key in KEYS:
                assert batches[step][key].shape == (phase.batch_size, phase.sequence_length)
                assert batches[step][key].dtype == (np.float32 if key == "loss_mask" else np.int32)
            step += 1


def test_packing_never_crosses_documents(undisturbed, corpus):
    batches, _ = undisturbed
    for batch in batches:
        ids, positions = batch["segment_ids"], batch["positions"]
        np.testing.assert_array_equal(batch["loss_mask"], ids > 0)
        assert (batch["inputs"][ids == 0] == corpus.tokenizer.pad).all()
        for row in range(len(ids)):
            count = ids[row].max()
            assert count >= 1
            lengths = [int((ids[row] == s).sum()) for s in range(1, count + 1)]
            expected = np.repeat([*range(1, count + 1), 0], [*lengths, len(ids[row]) - sum(lengths)])
            np.testing.assert_array_equal(ids[row], expected)
            for s, length in enumerate(lengths, 1):
                np.testing.assert_array_equal(positions[row][ids[row] == s], np.arange(length))
    for inputs, targets in segments(batches):
        assert inputs[0] == corpus.tokenizer.end_of_text
        assert inputs[1:] == targets[:-1]
        assert corpus.tokenizer.end_of_text not in targets[:-1], "one document an example, and nothing after its end"


def text_of(tokenizer, inputs, targets):
    """The characters of an example, put back in order; and whether it was filled in the middle."""
    tokens = targets[:-1] if targets[-1] == tokenizer.end_of_text else targets
    if tokenizer.fim_prefix not in tokens:
        return tokenizer.decode(tokens), False
    assert targets[-1] == tokenizer.end_of_text, "every sample ends"
    assert [tokens.count(t) for t in (2, 3, 4)] == [1, 1, 1]
    a, b = tokens.index(3), tokens.index(4)
    if a == 1:
        return tokenizer.decode(tokens[b + 1 :]) + tokenizer.decode(tokens[2:b]), True
    return "".join(map(tokenizer.decode, (tokens[1:a], tokens[b + 1 :], tokens[a + 1 : b]))), True


def test_every_example_is_a_part_of_one_document(undisturbed, corpus):
    batches, _ = undisturbed
    documents = [t for s in corpus.sources for t in corpus.documents(s, "train")]
    for inputs, targets in segments(batches):
        text, _ = text_of(corpus.tokenizer, inputs, targets)
        assert any(text in document for document in documents)
    valid = {t for s in corpus.sources for t in corpus.documents(s, "valid") if len(t) > 200}
    shown = {text_of(corpus.tokenizer, *s)[0] for s in segments(batches)}
    assert not valid & shown


def test_rates_of_the_phases(undisturbed, corpus):
    batches, _ = undisturbed
    kinds = [[text_of(corpus.tokenizer, *s)[1] for s in segments(batches[a:b])] for a, b in ((0, 5), (5, 9), (9, 16))]
    share = np.mean(kinds[0])
    assert abs(share - 0.5) < 5 * np.sqrt(0.25 / len(kinds[0]))
    assert not any(kinds[1])
    assert np.mean(kinds[2]) > 0.98, "all but the odd one that did not fit"


@given(st.data())
@settings(max_examples=8, deadline=None)
def test_resume_equals_the_undisturbed_run(corpus, undisturbed, pick):
    batches, states = undisturbed
    step = pick.draw(st.integers(0, STEPS))
    run = loader(corpus)
    for _ in range(pick.draw(st.integers(0, 3))):
        next(run)  # a loader that has moved on already
    run.set_state(json.loads(states[step]))
    assert json.dumps(run.get_state()) == states[step]
    again = pick.draw(st.integers(step, STEPS))
    for i in range(step, min(again + 3, STEPS)):
        if i == again:  # a second restart, soon after the first
            state = run.get_state()
            run = loader(corpus)
            run.set_state(state)
        same(next(run), batches[i])
        assert json.dumps(run.get_state()) == states[i + 1]


@pytest.mark.parametrize("step", [4, 5, 6, 8, 9, 10, 15, 16])
def test_resume_around_phase_borders(corpus, undisturbed, step):
    batches, states = undisturbed
    run = loader(corpus)
    run.set_state(json.loads(states[step]))
    rest = list(run)
    assert len(rest) == STEPS - step
    for a, b in zip(rest, batches[step:], strict=True):
        same(a, b)


def test_resume_in_another_process(corpus_path, undisturbed, tmp_path):
    batches, states = undisturbed
    (tmp_path / "in").write_bytes(pickle.dumps((str(corpus_path), PHASES, states[7])))
    code = (
        "import json, pickle, sys; from kwaicoder_jax import data;"
        "path, phases, state = pickle.load(open(sys.argv[1], 'rb'));"
        "run = data.TrainingLoader(data.Corpus.open(path), phases, seed=5, streams=4);"
        "run.set_state(json.loads(state));"
        "pickle.dump(list(run), open(sys.argv[2], 'wb'))"
    )
    paths = [str(tmp_path / "in"), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, *paths], check=True, env=environment)
    for a, b in zip(pickle.loads((tmp_path / "out").read_bytes()), batches[7:], strict=True):
        same(a, b)


@pytest.mark.parametrize("count", [2, 4])
def test_process_counts_give_the_same_global_batches(corpus, undisturbed, count):
    batches, _ = undisturbed
    runs = [loader(corpus, process_index=i, process_count=count) for i in range(count)]
    for expected, *parts in zip(batches, *runs, strict=True):
        same({key: np.concatenate([part[key] for part in parts]) for key in KEYS}, expected)


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 1)])
def test_another_process_count_picks_the_run_up(corpus, undisturbed, before, after):
    batches, states = undisturbed
    old = [loader(corpus, process_index=i, process_count=before) for i in range(before)]
    for run in old:
        for _ in range(7):
            next(run)
    state = data.merge_states([run.get_state() for run in old])
    assert json.dumps(state) == states[7]
    new = [loader(corpus, process_index=i, process_count=after) for i in range(after)]
    for run in new:
        run.set_state(state)
    for expected, *parts in zip(batches[7:], *new, strict=True):
        same({key: np.concatenate([part[key] for part in parts]) for key in KEYS}, expected)


def test_states_are_small(undisturbed):
    assert max(map(len, undisturbed[1])) < 8_000


def test_seeds_and_passes_differ(corpus, undisturbed):
    batches, _ = undisturbed
    other = next(loader(corpus, seed=6))
    assert (other["inputs"] != batches[0]["inputs"]).any()


def test_mixture_shares_are_shares_of_tokens(corpus):
    """Sources are told apart by their texts; each stream keeps its shares to within an example of 64 tokens."""
    phase = data.PhaseSpec(30, 8, 64, {"code": 3.0, "mathematics": 1.0, "tiny": 0.0}, data.FimOptions(rate=0.3))
    of = {"code": " \n".join(corpus.documents("code", "train"))}
    of["mathematics"] = " \n".join(corpus.documents("mathematics", "train"))
    tokens = collections.Counter()
    for inputs, targets in segments(loader(corpus, [phase], streams=2)):
        text, _ = text_of(corpus.tokenizer, inputs, targets)
        owners = [name for name, texts in of.items() if text in texts]
        tokens[owners[0] if len(owners) == 1 else "either"] += len(targets)
    total = sum(tokens.values())
    assert tokens["either"] < 0.01 * total
    assert abs(tokens["code"] / total - 0.75) < 0.02


def test_shares_are_counted_from_each_phase_s_start(corpus):
    """A second phase does not make up for what the first one's mixture left out."""
    fim = data.FimOptions(0.0)
    phases = [data.PhaseSpec(20, 4, 64, {"code": 1.0}, fim), data.PhaseSpec(20, 4, 64, MIXTURE, fim)]
    of_code = " \n".join(corpus.documents("code", "train"))
    tokens = collections.Counter()
    for inputs, targets in segments(list(loader(corpus, phases))[20:]):
        tokens[text_of(corpus.tokenizer, inputs, targets)[0] in of_code] += len(targets)
    assert abs(tokens[True] / sum(tokens.values()) - MIXTURE["code"]) < 0.05


class Watched:
    """Counts which (source, record, epoch) characters an example stream gives."""

    def __init__(self, monkeypatch):
        self.seen = collections.defaultdict(list)
        self.last = None
        original, original_carry = mixing.StreamIterator._tokens, mixing.StreamIterator.carried_over

        def tokens(iterator, source, opened, piece):
            key = iterator._names[source], opened.record.number, opened.record.epoch
            span = opened.start + piece.start, opened.start + piece.stop
            self.seen[key].append(span)
            self.last = key
            return original(iterator, source, opened, piece)

        def carried_over(iterator):
            self.seen[self.last].pop()  # read ahead, did not fit, given back
            return original_carry(iterator)

        monkeypatch.setattr(mixing.StreamIterator, "_tokens", tokens)
        monkeypatch.setattr(mixing.StreamIterator, "carried_over", carried_over)


def test_an_epoch_shows_each_record_once_across_phase_borders(corpus, monkeypatch):
    """One stream, three phases with other windows and mixtures: no character of an epoch is shown twice or left out.

    The packer reads one example ahead; where a run of rows ends, the same one is read again, and is counted once.
    """
    watched = Watched(monkeypatch)
    phases = [
        data.PhaseSpec(9, 2, 64, {"mathematics": 1, "tiny": 1, "code": 1}),
        data.PhaseSpec(11, 3, 200, {"tiny": 2, "code": 1}, data.FimOptions(0.0)),
        data.PhaseSpec(80, 2, 128, {"tiny": 1, "code": 4}),
    ]
    for _ in loader(corpus, phases, streams=1):
        pass
    for source in ("tiny", "code"):
        count = len(corpus.documents(source, "train"))
        epochs = max(epoch for name, _, epoch in watched.seen if name == source)
        assert epochs >= 1, "the test is about whole epochs"
        for epoch in range(epochs):
            open_yet = 0
            for record in range(count):
                spans = watched.seen.get((source, record, epoch), [])
                length = len(corpus.documents(source, "train")[record])
                place = 0
                for start, stop in sorted(set(spans)):
                    assert start == place, "a gap or a repetition"
                    place = stop
                open_yet += place != length
            assert open_yet <= (mixing.OPEN_DOCUMENTS if epoch == epochs - 1 else 0)


def test_nothing_that_was_read_is_dropped_at_a_phase_border(corpus):
    """What the batches show, put together, is each finished document of the first epoch in full."""
    phases = [data.PhaseSpec(n, 2, t, {"code": 1}, data.FimOptions(0.0)) for n, t in ((7, 64), (5, 100), (120, 64))]
    shown = collections.Counter()
    for inputs, targets in segments(loader(corpus, phases, streams=2)):
        shown[text_of(corpus.tokenizer, inputs, targets)[0]] += 1
    characters = sum(len(text) * count for text, count in shown.items())
    documents = list(corpus.documents("code", "train"))
    assert characters > sum(map(len, documents)), "more than an epoch was shown"
    joined = "\0".join(shown)
    short = [text for text in documents if len(text) < 60]
    assert short
    assert all(text in joined for text in short)
    for text in documents:  # every line of every document was shown
        missing = [line for line in text.split("\n") if line.strip() and line not in joined]
        assert not missing


def test_epochs_come_in_other_orders(corpus):
    records = mixing.endless(corpus, "code", 3)
    count = len(corpus.documents("code", "train"))
    orders = [[records[epoch * count + i] for i in range(count)] for epoch in range(3)]
    for epoch, order in enumerate(orders):
        assert sorted(r.number for r in order) == list(range(count))
        assert {r.epoch for r in order} == {epoch}
        assert all(corpus.documents("code", "train")[r.number] == r.text for r in order)
    assert orders[0] != orders[1] != orders[2]


def test_a_source_smaller_than_the_streams(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"words of document {i}\n" * 5)
    config = {"kind": "folder", "max_bytes": 10**5, "path": str(tmp_path)}
    for seed in range(50):
        try:
            data.prepare({"few": config}, tmp_path / "out", vocab_size=300, valid_fraction=0.4, seed=seed)
            break
        except UserError:
            continue
    few = data.Corpus.open(tmp_path / "out")
    run = loader(few, [data.PhaseSpec(3, 8, 64, {"few": 1.0})], streams=8)
    assert len(list(run)) == 3


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"streams": 3}, r"loader\.streams: 3 does not divide phase 0's batch of 8"),
        ({"streams": 0}, r"loader\.streams"),
        ({"streams": 2, "process_count": 4}, r"loader\.streams: 2 is not a multiple of the 4 processes"),
        ({"phases": []}, "phases"),
        ({"phases": [data.PhaseSpec(1, 4, 64, {"poems": 1.0})]}, "poems"),
    ],
)
def test_bad_arguments_name_their_field(corpus, arguments, fragment):
    with pytest.raises(UserError, match=fragment):
        loader(corpus, **arguments)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"sequence_length": 4}, "sequence_length"),
        ({"mixture": {}}, "mixture"),
        ({"mixture": {"code": -1.0, "tiny": 2.0}}, "mixture"),
        ({"mixture": {"code": float("nan")}}, "mixture"),
    ],
)
def test_bad_phases_name_their_field(change, fragment):
    with pytest.raises(UserError, match=fragment):
        data.PhaseSpec(**{"steps": 1, "batch_size": 4, "sequence_length": 64, "mixture": {"code": 1.0}, **change})


def test_states_of_another_run_are_refused(corpus, undisturbed, tmp_path, corpus_config):
    state = json.loads(undisturbed[1][3])
    data.prepare({**corpus_config, "extra": corpus_config["tiny"] | {"seed": 9}}, tmp_path / "o", vocab_size=500,
                 valid_fraction=0.15)  # fmt: skip
    others = {
        "seed": loader(corpus, seed=1),
        "streams": loader(corpus, streams=2),
        "phases": loader(corpus, PHASES[:2]),
        "corpus": loader(data.Corpus.open(tmp_path / "o")),
    }
    for field, other in others.items():
        with pytest.raises(UserError, match=rf"loader\.{field}"):
            other.set_state(state)
    del state["streams"]["2"]
    with pytest.raises(UserError, match="lacks stream 2"):
        loader(corpus).set_state(state)
    with pytest.raises(UserError, match="seed None"):
        loader(corpus).set_state({})
    with pytest.raises(UserError, match="different steps"):
        data.merge_states([json.loads(undisturbed[1][i]) for i in (3, 4)])


def test_prefetch_gives_the_same_and_knows_the_consumed_position(corpus, undisturbed):
    batches, states = undisturbed
    threads = threading.active_count()
    run = data.prefetch(loader(corpus), 3)
    assert json.dumps(run.get_state()) == states[0]
    for i in range(8):
        same(next(run), batches[i])
        assert json.dumps(run.get_state()) == states[i + 1], "not the position of the thread, which is ahead"
    run.set_state(json.loads(states[2]))
    rest = list(run)
    for a, b in zip(rest, batches[2:], strict=True):
        same(a, b)
    with pytest.raises(UserError, match="seed"):
        run.set_state({**json.loads(states[2]), "identity": {"seed": 0}})
    run.close()
    assert threading.active_count() == threads


def test_validation_batches_are_fixed_and_complete(corpus):
    batches = data.validation_batches(corpus, sequence_length=64, batch_size=4)
    assert set(batches) == set(corpus.sources)
    again = data.validation_batches(corpus, sequence_length=64, batch_size=4)
    for source, of_source in batches.items():
        for a, b in zip(of_source, again[source], strict=True):
            same(a, b)
            assert a["inputs"].shape == (4, 64)
        parts = [text_of(corpus.tokenizer, *s) for s in segments(of_source)]
        assert not any(is_fim for _, is_fim in parts)
        documents = list(corpus.documents(source, "valid"))
        assert sorted("".join(text for text, _ in parts)) == sorted("".join(documents))
        assert sum(targets.count(0) for _, targets in segments(of_source)) == len(documents)
        tokens = sum(b["loss_mask"].sum() for b in of_source)
        assert tokens == corpus.manifest["sources"][source]["tokens_valid"]


def test_validation_tokens_are_bounded(corpus):
    batches = data.validation_batches(corpus, sequence_length=64, batch_size=4, max_tokens_per_source=300)
    for of_source in batches.values():
        assert 236 <= sum(b["loss_mask"].sum() for b in of_source) <= 300
        assert (of_source[-1]["segment_ids"][-1] == 0).all() or len(of_source) >= 1
    one = data.validation_batches(corpus, sequence_length=64, batch_size=4, max_tokens_per_source=1)
    assert all(len(b) == 1 and (b[0]["segment_ids"][1:] == 0).all() for b in one.values())


def rows_of(batches):
    """Each row as bytes, in any order: the order of rows is drawn anew in each run."""
    return sorted(np.stack([batch[name][row] for name in sorted(batch)]).tobytes()
                  for batch in batches for row in range(len(batch["inputs"])))  # fmt: skip


@pytest.mark.parametrize("first", [1, 2])
def test_a_second_run_goes_on_where_the_first_ended(corpus, undisturbed, first):
    """Two runs, one after the other, see what one run through all their phases sees."""
    one = loader(corpus, PHASES[:first])
    seen = list(one)
    state = json.loads(json.dumps(one.get_state()))
    two = loader(corpus, PHASES[first:])
    two.go_on_from(state)
    whole = list(loader(corpus))
    assert rows_of(seen) == rows_of(whole[: one.steps])
    assert rows_of(two) == rows_of(whole[one.steps :])
    assert rows_of(loader(corpus, PHASES[first:])) != rows_of(whole[one.steps :])


def test_a_source_that_a_run_leaves_out_keeps_its_place(corpus):
    one = loader(corpus, PHASES[1:2])
    list(one)
    two = loader(corpus, PHASES[:1])  # without "tiny"
    two.go_on_from(one.get_state())
    next(two)
    resumed = loader(corpus, PHASES[:1])
    resumed.set_state(json.loads(json.dumps(two.get_state())))
    for run in (two, resumed):
        list(run)
        for number, stream in run.get_state()["streams"].items():
            assert stream["after"]["tiny"] == one.get_state()["streams"][number]["after"]["tiny"]


def test_a_run_that_goes_on_resumes_to_the_same(corpus):
    one = loader(corpus, PHASES[:1])
    list(one)
    two, again = loader(corpus, PHASES[1:]), loader(corpus, PHASES[1:])
    two.go_on_from(one.get_state())
    next(two)
    again.set_state(json.loads(json.dumps(two.get_state())))
    for a, b in zip(two, again, strict=True):
        same(a, b)


def test_going_on_needs_the_end_of_a_run_like_this_one(corpus):
    one = loader(corpus, PHASES[:1])
    next(one)
    with pytest.raises(UserError, match="not at its end"):
        loader(corpus).go_on_from(one.get_state())
    list(one)
    with pytest.raises(UserError, match=r"loader\.seed"):
        loader(corpus, seed=6).go_on_from(one.get_state())


@pytest.mark.parametrize(("batch", "streams"), [(64, 64), (128, 64), (256, 64), (64, 4)])
def test_streams_pack_in_turn(batch, streams):
    """No step but the first has to wait for more than its share of the packings, and every row is in one of them."""
    phases, share = [data.PhaseSpec(100, batch, 64, MIXTURE), data.PhaseSpec(7, batch, 64, MIXTURE)], batch // streams
    begun, widths = collections.Counter(), set()
    for stream in range(streams):
        parts, row = loading.runs_of(phases, streams, stream), 0
        for number, phase in enumerate(phases):
            assert sum(part.rows for part in parts if part.phase == number) == phase.steps * share
        for part in (part for part in parts if part.phase == 0):
            assert part.rows % part.bins == 0
            widths.add(part.bins)
            for first in range(row, row + part.rows, part.bins):
                begun[first // share] += part.bins
            row += part.rows
    assert max(widths) == max(16, share)
    assert max(rows for step, rows in begun.items() if step) <= batch  # as many as a step takes
    assert begun[0] <= batch * (1 + 16 // share) / 2
