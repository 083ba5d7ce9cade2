"""A cluster that goes away is noticed: Ray itself would end the job without a word."""

import socket
import time

from pipeline import cluster


def test_a_head_that_answers_no_more_is_named(monkeypatch, capsys):
    monkeypatch.setattr(cluster, "_HEAD_LOOK_SECONDS", 0.05)
    head = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{head.getsockname()[1]}"
    with cluster._watched(address):
        time.sleep(0.4)
        assert capsys.readouterr().out == ""
        head.close()
        time.sleep(0.6)
    said = capsys.readouterr().out
    assert said.count(f"the head of the Ray cluster at {address} does not answer any more") == 1
    assert "give the same command again" in said
