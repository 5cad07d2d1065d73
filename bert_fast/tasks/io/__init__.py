"""Labelled data: tables, column roles, file formats, SQuAD and tag schemes."""
