"""Pretraining SANE on a token store: plan (order), stream (Ray Data), step (torch), worker (loop), state, launcher."""
