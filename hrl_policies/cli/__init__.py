"""The ``kuaifair`` command."""
