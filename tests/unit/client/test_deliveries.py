"""What a step stands for: ranges and weight, when it fails, and when the membership ends."""

from paramesh.deliveries import Deliveries
from paramesh.v1.types_pb2 import SampleRange


def some(begin, end):
    return SampleRange(dataset="", epoch=0, begin=begin, end=end)


def test_a_retried_step_weighs_what_the_failed_one_did():
    deliveries = Deliveries()
    deliveries.delivered(some(0, 8), 8)
    assert deliveries.take("g") == ([some(0, 8)], 8)
    deliveries.delivered(some(8, 12), 4)
    ranges, weight = deliveries.take("g")
    assert weight == 4
    deliveries.restore(ranges, "g")
    assert deliveries.take("g") == ([some(8, 12)], 4)
    deliveries.delivered(some(12, 14), 2)
    deliveries.restore([some(8, 12)], "g")
    assert deliveries.take("g") == ([some(8, 12), some(12, 14)], 6)
    assert deliveries.take("g") == ([], 1)


def test_a_restored_take_is_one_groups_own():
    deliveries = Deliveries()
    deliveries.delivered(some(0, 8), 8)
    ranges, _ = deliveries.take("d")
    deliveries.take("g")
    deliveries.restore(ranges, "d")
    assert deliveries.take("g") == ([some(0, 8)], 1)
    assert deliveries.take("d") == ([], 8)


def test_samples_of_an_ended_membership_weigh_nothing_and_spoil_a_gradient():
    deliveries = Deliveries()
    deliveries.delivered(some(0, 8), 8)
    assert not deliveries.lost("g")
    deliveries.take("g")
    deliveries.clear()
    deliveries.delivered(some(8, 12), 4)
    assert not deliveries.lost("g")  # nothing was accumulated when it ended
    assert deliveries.take("g")[1] == 4
    deliveries.delivered(some(12, 16), 4)
    deliveries.clear()
    deliveries.delivered(some(20, 22), 2)
    assert deliveries.lost("g")
    assert deliveries.take("g") == ([some(20, 22)], 2)
    assert not deliveries.lost("g")
