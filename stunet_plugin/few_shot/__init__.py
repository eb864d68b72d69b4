"""``stunet few-shot``: which weights learn best from a few labelled cases, by trying."""
