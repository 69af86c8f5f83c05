"""Adapters of this project, PEFT, XTuner and PaddleMIX: read, checked against a base, merged."""
