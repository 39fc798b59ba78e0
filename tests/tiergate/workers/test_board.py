"""Whose turn it is to accept."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tiergate.workers.board import Board, Share


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board.create(4)
    yield made
    made.close()


def test_what_one_process_writes_another_reads(board: Board) -> None:
    board.write(2, 7)
    other = Board(board.fd, 4)
    assert (other.read(2), other.read(0)) == (7, None)
    other.write(0, 0)
    assert board.read(0) == 0
    board.write(2, None)
    assert other.read(2) is None


def test_the_one_with_more_connections_lets_the_other_go_first(board: Board) -> None:
    one, two = Share(board, 0), Share(board, 1)
    assert one.mine(100), "alone, everything is its own"
    one.tell(3)
    two.tell(2)
    assert not one.mine(3)
    assert one.mine(2)
    assert two.mine(2)


def test_one_that_accepts_no_more_holds_nobody_back(board: Board) -> None:
    one, two = Share(board, 0), Share(board, 1)
    one.tell(5)
    two.tell(0)
    assert not one.mine(5)
    two.tell(None)
    assert one.mine(5)


def test_with_many_connections_a_small_difference_is_no_reason_to_wait(board: Board) -> None:
    one, two = Share(board, 0), Share(board, 1)
    two.tell(160)
    assert one.mine(170)
    assert not one.mine(171)
