"""Laws of the plot of the blocks."""

from lora_fuse.release.block_plot import block_plot


def test_the_plot_of_the_blocks_is_small_and_the_same_each_time() -> None:
    blocks = [(str(number), number / 60) for number in range(60)]
    picture = block_plot(blocks)
    assert picture == block_plot(blocks)
    assert len(picture) < 10_000
    assert picture != block_plot([*blocks[:-1], ("59", 0.5)])
    assert block_plot([("0", 0.0)])
