"""``python -m lora_fuse``, and the command ``lora-fuse``."""

from lora_fuse.machine import interrupts


def main() -> int:
    """Run the command line, whose imports are part of what may go wrong."""
    interrupts.install(interrupts.KEPT)
    from lora_fuse.cli import main as run

    return run()


if __name__ == "__main__":
    interrupts.leave(main())
