"""The table of layers says on which devices they are, and is otherwise Lightning's."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary
from lightning.pytorch.utilities.model_summary import summarize

from lightning_hetero.testing.lightning_module import Classifier, data


class WithExample(Classifier):
    example_input_array = torch.zeros(2, 8, dtype=torch.float64)


def cells(text: str) -> dict[str, list[str]]:
    """The cells of a table by the name of the layer."""
    rows = [[cell.strip() for cell in re.split("[|│┃]", line)] for line in text.splitlines()]
    return {row[at + 1]: row for row in rows for at in [0 if row[0] else 1] if len(row) > 4}


@pytest.mark.feature("callbacks: ModelSummary, RichModelSummary", note="Their tables have a column with devices.")
def test_a_column_says_where_layers_are(hostile: Any, devices: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    summary = ModelSummary(max_depth=2)
    trainer = hostile(callbacks=[summary], max_epochs=1)
    trainer.fit(WithExample(), data())
    assert "is not cut into micro-batches" not in caplog.text  # while Lightning counts the operations of the example
    (text,) = (record.message for record in caplog.records if "Trainable params" in record.message)
    assert re.search(r"\| Params \| Params per Device +\| Mode", text)
    place_of = trainer.strategy.plan.device_of
    table = cells(text)
    for name, count in {"net.first": "144", "net.second": "272", "net.third": "68"}.items():
        assert f"{count} {place_of[name]}" in table[name]
        assert "[2, 8]" in table["net.first"]
    assert table["net"][4] == ", ".join(
        f"{count} {place_of[name]}" for name, count in (("net.first", 144), ("net.second", 272), ("net.third", 68))
    )
    assert "_summary" not in vars(summary)


@pytest.mark.feature("callbacks: ModelSummary, RichModelSummary", note="Their tables have a column with devices.")
def test_the_rich_table_has_it_too(hostile: Any, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    trainer = hostile(callbacks=[RichModelSummary(max_depth=2)], max_epochs=1)
    trainer.fit(Classifier(), data())
    text = capsys.readouterr().out
    assert "Params per Device" in text
    assert f"272 {trainer.strategy.plan.device_of['net.second']}" in text


@pytest.mark.feature("callbacks: ModelSummary, RichModelSummary", note="Their tables have a column with devices.")
def test_a_users_own_table_and_names_of_layers_are_left_alone(both: Any) -> None:
    class Own(ModelSummary):
        @staticmethod
        def summarize(summary_data: Any, *_: Any, **__: Any) -> None:
            seen.append(summary_data)

    class Looks(WithExample):
        def on_train_start(self) -> None:
            self.text = str(summarize(self, max_depth=-1))

    seen: list[Any] = []
    sides = both(Looks, callbacks=lambda: [Own(max_depth=-1)], max_epochs=1)
    assert seen[1] == seen[0]
    assert sides.spread.model.text == sides.alone.model.text


@pytest.mark.feature("callbacks: ModelSummary, RichModelSummary", note="Their tables have a column with devices.")
def test_a_plan_on_one_device_adds_no_column(hostile: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    hostile(strategy={"placement": "single"}, callbacks=[ModelSummary()], max_epochs=1).fit(Classifier(), data())
    assert "Trainable params" in caplog.text
    assert "per Device" not in caplog.text
