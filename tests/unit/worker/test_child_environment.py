"""What a training process finds in its environment."""

from __future__ import annotations

from paramesh_worker.environment import Place, child_environment, wants_one_thread

PLACE = Place(coordinator="a:1,b:2", job="j", host="h", host_incarnation=2**63 - 1, local_rank=1, restart=2)


def test_the_contract_with_the_library():
    env = child_environment({"PATH": "/bin"}, PLACE, nproc=1)
    assert env == {
        "PATH": "/bin",
        "PARAMESH_COORDINATOR": "a:1,b:2",
        "PARAMESH_JOB": "j",
        "PARAMESH_SLOT": "h/1",
        "PARAMESH_HOST": "h",
        "PARAMESH_HOST_INCARNATION": str(2**63 - 1),
        "PARAMESH_LOCAL_RANK": "1",
        "PARAMESH_RESTART": "2",
        "PYTHONUNBUFFERED": "1",
    }


def test_what_the_user_set_is_passed_on_but_not_a_stale_place():
    inherited = {"PARAMESH_MODE": "ssp", "PARAMESH_SLOT": "old/7", "PYTHONUNBUFFERED": "", "PYTHONPATH": "x"}
    env = child_environment(inherited, PLACE, nproc=1)
    assert env["PARAMESH_MODE"] == "ssp"
    assert env["PARAMESH_SLOT"] == "h/1"
    assert env["PYTHONUNBUFFERED"] == ""
    assert env["PYTHONPATH"] == "x"
    assert inherited["PARAMESH_SLOT"] == "old/7", "the supervisor's own environment is not touched"


def test_one_thread_each_only_when_several_share_the_machine_and_nobody_chose():
    assert not wants_one_thread({}, 1)
    assert wants_one_thread({}, 2)
    assert not wants_one_thread({"OMP_NUM_THREADS": "4"}, 2)
    assert child_environment({}, PLACE, nproc=2)["OMP_NUM_THREADS"] == "1"
    assert child_environment({"OMP_NUM_THREADS": "4"}, PLACE, nproc=2)["OMP_NUM_THREADS"] == "4"
    assert "OMP_NUM_THREADS" not in child_environment({}, PLACE, nproc=1)


def test_the_preferred_rank_counts_from_the_supervisors():
    assert child_environment({"PARAMESH_RANK": "4"}, PLACE, nproc=2)["PARAMESH_RANK"] == "5"
    assert "PARAMESH_RANK" not in child_environment({}, PLACE, nproc=2)
