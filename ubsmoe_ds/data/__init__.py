"""Rows of multiple-choice questions, their partition between clients, and batches of tokens."""
