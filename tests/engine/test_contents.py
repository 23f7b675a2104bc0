"""What is kept of things in attributes of a module, to see whether a trial has changed them."""

from __future__ import annotations

import random

from lightning_hetero.runtime.engine.contents import content, is_same, put_back


def test_a_generator_of_python_is_compared_and_put_back() -> None:
    generator = random.Random(1)
    kept = content(generator, may_be_large=True)
    assert is_same(generator, kept)
    drawn = generator.random()
    assert not is_same(generator, kept)
    put_back(generator, kept)
    assert is_same(generator, kept)
    assert generator.random() == drawn
