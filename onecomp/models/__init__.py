"""Reading a Hugging Face decoder block by block: its weights, its parts, and how it is called."""

from onecomp.models.calls import BlockCall as BlockCall
from onecomp.models.calls import record_calls as record_calls
from onecomp.models.checks import max_positions as max_positions
from onecomp.models.checks import require_known_tokens as require_known_tokens
from onecomp.models.checks import require_positions as require_positions
from onecomp.models.checks import require_stored_tensors as require_stored_tensors
from onecomp.models.config import ModelConfig as ModelConfig
from onecomp.models.config import load_tokenizer as load_tokenizer
from onecomp.models.layout import BlockLayout as BlockLayout
from onecomp.models.layout import InputGroup as InputGroup
from onecomp.models.layout import ModelLayout as ModelLayout
from onecomp.models.layout import inspect_model as inspect_model
from onecomp.models.skeleton import Skeleton as Skeleton
from onecomp.models.source import ModelSource as ModelSource
from onecomp.models.suspended import SuspendedForward as SuspendedForward
