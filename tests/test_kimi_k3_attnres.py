"""Kimi K3's text model: against the official code's numbers, and as a model among the others."""

import pytest
import torch
from kimi_k3_tiny import expected_logits, fixture_model


# fp32: sums of other kernels over 7 layers, logits of up to 3.4. What is computed otherwise shows from 0.14 on.
OFFICIAL = {"rtol": 0, "atol": 2e-4}


@pytest.fixture(scope="module")
def model():
    return fixture_model()


@torch.no_grad()
def test_the_official_codes_logits(model):
    expected = expected_logits()
    logits = model(expected["input_ids"][:1].long()).logits
    torch.testing.assert_close(logits, expected["logits"], **OFFICIAL)


@torch.no_grad()
def test_the_official_codes_logits_under_left_padding(model):
    expected = expected_logits()
    mask = expected["attention_mask"].bool()
    assert not mask.all()
    logits = model(expected["input_ids"].long(), attention_mask=mask.long()).logits
    torch.testing.assert_close(logits[mask], expected["padded_logits"][mask], **OFFICIAL)
