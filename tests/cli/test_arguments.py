"""Values of a configuration against the types that a class declares: wrong ones are refused, loose ones are not."""

from __future__ import annotations

import pytest

from lightning_hetero.cli.arguments import check_arguments
from lightning_hetero.errors import UsageError


class Loose:
    """As people write it. A default says what an annotation forgot."""

    def __init__(
        self,
        hidden: int = None,  # type: ignore[assignment]  # noqa: RUF013
        rate: int = 0.5,  # type: ignore[assignment]
        width: int = 8,
        path: str | list[str] = "",
    ) -> None:
        pass


TARGET = f"{__name__}.Loose"


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_hetero.cli.arguments.get_object", lambda target: Loose)


@pytest.mark.parametrize(
    "given", [{"hidden": None}, {"hidden": 3}, {"rate": 0.1}, {"width": 3}, {"path": 3}, {"other": "x"}], ids=str
)
def test_what_the_class_would_have_taken_passes(given: dict[str, object]) -> None:
    check_arguments("model", {"_target_": TARGET, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hidden": "abc"}, "model.hidden='abc' must be a whole number or null"),
        ({"width": 1.5}, "model.width=1.5 must be a whole number"),
        ({"width": None}, "model.width=None must be a whole number"),
    ],
    ids=str,
)
def test_what_it_would_notice_late_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_arguments("model", {"_target_": TARGET, **given})
