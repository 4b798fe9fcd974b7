"""Which messages of a plain RuntimeError, and which kinds of error, tell of a fault, and which of a bug."""

import pytest
from ray.data.exceptions import ExecutionTimeoutError

from sane_ray.pretraining.faults import is_fault, root_bug


@pytest.mark.parametrize(
    "message",
    [
        "[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:17309.",
        "[pair.cc:547] Read error [10.0.0.1]:1: Connection reset by peer",
        "[pair.cc:534] writev [10.0.0.1]:1: Broken pipe",
        "[unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete",
        "Application timeout caused pair closure",
        "Gloo connectFullMesh failed with [../pair.cc:144] no error",
        "Socket Timeout",
        "The client socket has timed out after 600000ms while trying to connect to (10.0.0.1, 29500).",
        "The server socket has failed to listen on any local network address.",
        "Timed out after 601 seconds waiting for clients. 3/4 clients joined.",
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
        "wait timeout after 300000ms, keys: /default_pg/0/store_based_barrier_key",
        "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=4) ran for 600000 milliseconds",
        "NCCL error: remote process exited or there was a network error",
        "NCCL communicator was aborted on rank 3.",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: unspecified launch failure",
        "CUDA error: unknown error",
        "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
        "CUDA error: uncorrectable NVLink error detected during the execution",
    ],
)
def test_what_gloo_nccl_and_cuda_say_of_a_failure_is_a_fault(message):
    assert is_fault(RuntimeError(message))


@pytest.mark.parametrize(
    "message",
    [
        "size of tensor a (3) must match the size of tensor b (4) in peer_index",
        "expected 3 timeouts, found 4",
        "timeout must be positive",
        "socket is not a field of the config",
        "peer access is not supported between these two devices",
        "nvlink_topology has no attribute links",
        "the field is no longer available: use window",
        "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
        "CUDA error: device-side assert triggered",
    ],
)
def test_words_of_these_in_the_message_of_a_bug_make_it_no_fault(message):
    assert not is_fault(RuntimeError(message))


@pytest.mark.parametrize("kind", [FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError])
def test_whatever_storage_refuses_is_a_fault(kind):
    assert is_fault(kind("the mount point while storage is away"))


def test_data_that_stopped_coming_are_a_fault():
    error = ExecutionTimeoutError("Dataset execution made no progress for at least 1800s of scheduling time")
    assert is_fault(error)
    assert root_bug({0: error}) is None
