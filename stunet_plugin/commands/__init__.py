"""Commands of ``stunet``, one light file each."""
