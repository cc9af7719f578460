"""Code that lies on a disk, curated into a corpus:

    python -m experiments.prepare_data --config=configs/curate.py --workdir=runs/code \\
        --config.prepare_data.places.code.path=FOLDER --config.prepare_data.decontamination.folder=BENCHMARKS

`docs/data_engine.md` says what can be set.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """The recipe of the data alone."""
    config = ConfigDict()
    config.stages = ("prepare_data",)
    config.seed = 0
    config.prepare_data = {
        "sources": {},
        "places": {
            "code": {
                "kind": "folder",  # or git, archives, jsonl, parquet
                "path": config_dict.placeholder(str),
                "licence": "",  # of what says nothing of its own
            },
        },
        "reading": {"allow_unknown_licence": True},
        "cleaning": {},  # rules can be changed: {"rules": {"digits": {"at_most": 0.3}}}
        "deduplication": {"threshold": 0.7, "permutations": 256, "width": 5},
        "decontamination": {"folder": config_dict.placeholder(str), "width": 10},
        "quality": {  # with one of the files: scores, and the lowest tenth of each language goes
            "scorer": config_dict.placeholder(str),  # a scorer.npz that an earlier run made
            "labels": config_dict.placeholder(str),  # rows of "text" and "label", to train one
            "drop": 0.1,
            "of": "good",
        },
        "engine": {"kind": "local", "workers": 2, "options": ()},
        "store": config_dict.placeholder(str),  # a folder that all workers see; WORKDIR/store unless given
        "vocab_size": 16_384,
        "valid_fraction": 0.005,
        "seed": config_dict.placeholder(int),
    }
    return config
