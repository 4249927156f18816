"""Every golden case: outputs of the official code against the functions that ``zoo run`` uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from golden_cases import OWN, Case, adapter_for, adapters_of, all_cases, load_adapters

load_adapters()
CASES = all_cases()


@pytest.mark.parametrize(("slug", "path"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_golden(slug: str, path: Path, record_verified: Callable[[str, str, str, str], None]) -> None:
    if not adapters_of(slug):
        pytest.skip(f"no adapter for {slug}")
    case = Case(path)
    adapter_for(slug, case).run(case)
    if OWN in path.parents:
        record_verified(slug, "golden", path.stem, "")


def test_every_own_slug_has_an_adapter() -> None:
    assert {path.name for path in OWN.iterdir() if path.is_dir()} <= {
        slug for _, slug, _ in CASES if adapters_of(slug)
    }


def test_a_changed_output_is_noticed(tmp_path: Path) -> None:
    """The comparison can fail: spoil one output of a case and it must."""
    source = OWN / "divprune" / "case_a_gauss.npz"
    arrays = dict(np.load(source))
    arrays["order"] = arrays["order"][::-1].copy()
    spoiled = tmp_path / "spoiled.npz"
    np.savez(spoiled, **arrays)
    case = Case(spoiled)
    with pytest.raises(AssertionError):
        adapter_for("divprune", case).run(case)
