"""Calibration data: configuration, sources of text, strategies that cut it into samples."""

from onecomp.calibration.config import STRATEGIES as STRATEGIES
from onecomp.calibration.config import CalibrationConfig as CalibrationConfig
from onecomp.calibration.prepare import prepare_calibration_samples as prepare_calibration_samples
from onecomp.calibration.quality import is_clean_prose as is_clean_prose
from onecomp.calibration.samples import CalibrationSamples as CalibrationSamples
from onecomp.calibration.sampling import sample_from_model as sample_from_model
from onecomp.calibration.sources import load_texts as load_texts
from onecomp.calibration.strategies import make_samples as make_samples
