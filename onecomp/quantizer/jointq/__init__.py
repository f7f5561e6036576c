"""JointQ: settings and result."""

from onecomp.quantizer.jointq import layer as layer  # registers the layer of its results
from onecomp.quantizer.jointq.quantizer import JointQ as JointQ
from onecomp.quantizer.jointq.result import JointQResult as JointQResult
