"""Rows of labelled data: tables, columns, sources, SQuAD, tag schemes."""
