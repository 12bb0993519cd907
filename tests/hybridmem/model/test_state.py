import pytest
import torch

from hybridmem.model.state import key_buffer, map_state


def rows(count, heads=3, dim=4):
    return torch.randn(2, heads, count, dim), torch.randn(2, heads, count, dim)


@pytest.mark.parametrize(("front", "window"), [(0, 5), (2, 5), (2, None), (0, None)])
def test_a_buffer_holds_what_concatenation_gives(front, window):
    persistent = torch.randn(2, 2, 3, front, 4)
    keys, values = rows(4)
    buffer = key_buffer(keys, values, persistent)
    for _ in range(120):  # several times more than there is room for
        k, v = rows(1)
        buffer = buffer.followed_by(k, v)
        keys, values = torch.cat((keys, k), 2), torch.cat((values, v), 2)
        for seen, of_front, kept in zip(buffer.seen, persistent.unbind(1), (keys, values), strict=True):
            assert torch.equal(seen, torch.cat((of_front, kept), 2))
        if window is not None:
            buffer = buffer.last(window - 1)
            keys, values = keys[:, :, 1 - window :], values[:, :, 1 - window :]
        assert torch.equal(buffer.keys, keys)


def test_the_next_token_leaves_the_keys_before_it_in_place():
    buffer = key_buffer(*rows(6), torch.randn(2, 2, 3, 1, 4)).last(3)
    before = buffer.keys.clone()
    buffer.followed_by(*rows(1))  # the front moves up to the three keys
    assert torch.equal(buffer.keys, before)


def test_rows_of_a_buffer_can_be_repeated_and_selected():
    buffer = key_buffer(*rows(4), torch.randn(2, 2, 3, 1, 4)).followed_by(*rows(1))
    repeated = map_state(lambda x: x.repeat_interleave(2, dim=0), buffer)
    more = torch.randn(4, 3, 1, 4)
    assert torch.equal(repeated.followed_by(more, more).keys[:, :, :-1], buffer.keys.repeat_interleave(2, dim=0))


def test_a_buffer_made_in_inference_mode_is_copied_outside_of_it():
    with torch.inference_mode():
        buffer = key_buffer(*rows(4), torch.randn(2, 2, 3, 1, 4))
    k, v = rows(1)
    assert torch.equal(buffer.followed_by(k, v).keys, torch.cat((buffer.keys, k), 2))
