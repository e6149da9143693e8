"""Losses on logits that depend on them only through their sum, squares and target entries; and cross-entropy."""
