"""Suites: several public datasets put to a vision-language model by one protocol, dense and with a method.

``uniprunebench.toml`` and ``effivlm-bench.toml`` in this folder describe the datasets of two papers; a file of the same
form describes a suite of one's own, on the hub or on this machine. ``zoo eval MODEL --suite`` asks all of a suite, the
task ``benchmark`` of ``zoo bench`` one dataset.

- ``tables``: what a suite file says;
- ``rows``: the rows of a dataset as questions;
- ``answers``: what an answer says, and what it is worth;
- ``scores``: the score of a dataset, and what is kept over all of them;
- ``asking``: questions to a model, and how fast it answers;
- ``examination``: a whole suite, one dataset after the other.
"""
