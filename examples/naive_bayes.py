"""Multinomial naive Bayes on word counts: the baseline of the text classifiers."""

from __future__ import annotations

from examples.trainer_comparison import Row


def accuracy(train: list[Row], test: list[Row]) -> float:
    """The accuracy on `test` after training on `train`; rows have text and label."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(CountVectorizer(), MultinomialNB())
    model.fit([row["text"] for row in train], [row["label"] for row in train])
    return float(model.score([row["text"] for row in test], [row["label"] for row in test]))
