"""The Python API: quantize, save, evaluate. A table of contents; the work is done elsewhere."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onecomp.calibration import CalibrationConfig, prepare_calibration_samples
from onecomp.errors import ConfigError
from onecomp.evaluation import calculate_perplexity
from onecomp.executor import Executor, default_executor
from onecomp.export.install import require_no_checkpoint
from onecomp.export.live import save_live_model
from onecomp.export.load import let_peft_know_quantized_layers
from onecomp.export.save import has_format
from onecomp.job import QuantizationJob
from onecomp.models import ModelConfig
from onecomp.post_process.base import PostQuantizationProcess, run_and_record
from onecomp.qep import QEPConfig
from onecomp.quantizer import QuantizationResult, Quantizer, result_files
from onecomp.quantizer.quant_linear import dense_layers
from onecomp.quantizer.several import ResultsOf, Several
from onecomp.session import Session
from onecomp.storage import AnyPath, TemporaryPath, open_path

logger = logging.getLogger(__name__)


class Runner:
    """Quantizes one model with one method.

    Args:
        model_config: The model.
        quantizer: Method and settings; its ``results`` are filled by ``run``.
        quantizers: Several of them in place of one: all quantize the same layers on the original
            model's inputs, from one pass over the calibration text.
        calibration_config: Text to calibrate on; default: 512 samples of C4.
        qep: Propagate errors of quantized layers to the layers behind them.
        qep_config: How; implies nothing without ``qep=True``.
        report_progress: A bar on a terminal, a log line per block elsewhere.
        executor: Where the work runs; yours to stop. By default ``default_executor()``.
        run_dir: Directory that survives the process, so that an interrupted run goes on; by
            default one that ends with the Runner.
        num_shards: Calibration shards; by default up to 64 of at least 1024 tokens.
        post_processes: What improves the quantized model afterwards, in order; ``quantized_model``
            is the result.

    Example:
        >>> runner = Runner(ModelConfig("my-model"), GPTQ(groupsize=128))  # doctest: +SKIP
        >>> runner.run()  # doctest: +SKIP
        >>> runner.save_quantized_model("my-model-w4")  # doctest: +SKIP
    """

    def __init__(  # noqa: PLR0913 - the documented signature
        self,
        model_config: ModelConfig | None = None,
        quantizer: Quantizer | None = None,
        quantizers: Sequence[Quantizer] | None = None,
        calibration_config: CalibrationConfig | None = None,
        qep: bool = False,
        qep_config: QEPConfig | None = None,
        report_progress: bool = True,
        *,
        executor: Executor | None = None,
        run_dir: str | Path | None = None,
        num_shards: int | None = None,
        post_processes: Sequence[PostQuantizationProcess] | None = None,
    ):
        self.model_config = model_config
        self.quantizer = quantizer
        self.quantizers = None if quantizers is None else list(quantizers)
        self.calibration_config = calibration_config or CalibrationConfig()
        self.qep = qep
        self.qep_config = qep_config or QEPConfig()
        self.report_progress = report_progress
        self.executor = executor
        self.run_dir = None if run_dir is None else open_path(run_dir)
        self.num_shards = num_shards
        self.post_processes = list(post_processes or ())
        self.quantized_model: PreTrainedModel | None = None
        self._session: Session | None = None
        self._temporary: TemporaryPath | None = None

    # Quantizing

    def check(self) -> None:
        """Check the settings against each other.

        Raises:
            ConfigError: With every problem at once.
        """
        problems = []
        if not isinstance(self.model_config, ModelConfig):
            problems.append(f"model_config={self.model_config!r}: must be a ModelConfig.")
        problems += [*self._method_problems(), *self._process_problems()]
        if problems:
            raise ConfigError("Runner", problems)

    def _method_problems(self) -> list[str]:
        if self.quantizers is not None:
            if self.quantizer is not None:
                return ["quantizer and quantizers are both given. Give one of them."]
            if self.qep:
                return [
                    "qep=True lets each method see its own errors, quantizers share one pass over "
                    "the original model's inputs. Use qep=False, or one Runner for each."
                ]
            return []
        if not isinstance(self.quantizer, Quantizer):
            return [f"quantizer={self.quantizer!r}: must be a Quantizer, e.g. GPTQ()."]
        if self.qep and not self.quantizer.flag_hessian:
            return [
                f"qep=True needs a method that uses the Hessian; {self.quantizer.name} does not. "
                "Use GPTQ, or qep=False."
            ]
        return []

    def _process_problems(self) -> list[str]:
        problems = [
            f"post_processes has {process!r}: must be PostQuantizationProcess objects."
            for process in self.post_processes
            if not isinstance(process, PostQuantizationProcess)
        ]
        if self.post_processes and self.quantizers is not None:
            problems.append(
                "post_processes improve one quantized model, but quantizers make several. Give "
                "quantizer, or run the processes on what create_quantized_model gives."
            )
        method = self.quantizer
        if self.post_processes and isinstance(method, Quantizer) and not has_format(method):
            problems.append(
                f"post_processes need quantized layers, and {method.name} has none. Use GPTQ, RTN, "
                "JointQ, AutoBit, DBF or Onebit."
            )
        return problems

    @property
    def _method(self) -> Quantizer:
        """What is run: the one quantizer, or all of them."""
        return self._which(None) if self.quantizers is None else Several(quantizers=self.quantizers)

    def _which(self, quantizer: Quantizer | None) -> Quantizer:
        """The quantizer that was given, else the Runner's only one."""
        if quantizer is not None:
            return quantizer
        own = self.quantizers or ([] if self.quantizer is None else [self.quantizer])
        if len(own) != 1:
            names = ", ".join(str(method.name) for method in own) or "none"
            raise ConfigError("Runner", [f"say which quantizer is meant: the Runner has {names}."])
        return own[0]

    def run(self) -> None:
        """Quantize the model; results are in ``quantizer.results`` and in the run directory.

        With ``quantizers``, each has its own.
        """
        self.check()
        self.quantized_model = None
        self._session = Session.open(self._job(), self._run_path())
        executor = self.executor or default_executor()
        logger.info("workers: %s", executor.describe())
        try:
            self._session.quantize(executor, report_progress=self.report_progress)
        finally:
            if self.executor is None:
                executor.stop()
        results = self._session.run.results(keeps=self._temporary)
        if self.quantizers is None:
            self.quantizer.results = results
        for quantizer in self.quantizers or ():
            quantizer.results = ResultsOf(results, quantizer.name)
        if self.post_processes:
            self.run_post_processes()

    def run_post_processes(self) -> None:
        """Improve the quantized model by each of ``post_processes``, in order.

        They work on a live model, which is ``quantized_model`` afterwards; what each did is in its
        ``config.quantization_config`` and in the journal of the run.
        """
        model, _ = self.create_quantized_model()
        for process in self.post_processes:
            entry = run_and_record(process, model, self.model_config)
            self._finished().run.append("post_process", **entry)
        self.quantized_model = model

    def prepare_calibration_dataset(
        self, device: str, model: PreTrainedModel | None = None
    ) -> dict[str, Tensor]:
        """The calibration batch: ``input_ids`` and ``attention_mask``, int64 ``(N, L)``."""
        samples = prepare_calibration_samples(
            self.calibration_config,
            self.model_config.load_tokenizer(),
            self.model_config.load_model if model is None else lambda: model,
        )
        return {
            "input_ids": samples.input_ids.to(device),
            "attention_mask": samples.attention_mask.to(device),
        }

    def _job(self) -> QuantizationJob:
        return QuantizationJob(
            self.model_config,
            self._method,
            self.calibration_config,
            self.qep_config if self.qep else None,
            num_shards=self.num_shards,
        )

    def _run_path(self) -> AnyPath:
        if self.run_dir is not None:
            return self.run_dir
        self._temporary = TemporaryPath("onecomp-run-")
        return self._temporary.path

    def _finished(self) -> Session:
        if self._session is None:
            raise ConfigError("Runner", ["nothing is quantized yet. Call run() first."])
        return self._session

    def _results(self, quantizer: Quantizer | None) -> Mapping[str, QuantizationResult]:
        results = self._which(quantizer).results
        if not results:
            raise ConfigError("Runner", ["there are no results yet. Call run() first."])
        return results

    # Saving

    def save_quantized_model(
        self,
        save_directory: str | Path,
        pack_weights: bool = True,
        save_format: str = "auto",
        *,
        quantizer: Quantizer | None = None,
    ) -> Path:
        """Write the quantized checkpoint, block by block.

        Args:
            save_directory: New directory.
            pack_weights: Pack codes into 32-bit words, as serving engines expect.
            save_format: Only ``auto``.
            quantizer: Whose results; default: the Runner's.

        Raises:
            NotImplementedError: The method has no checkpoint format.
            InputError: The directory already holds a checkpoint.
        """
        if save_format != "auto":
            raise ConfigError(
                "save_quantized_model", [f"save_format={save_format!r}: must be 'auto'."]
            )
        quantizer = self._which(quantizer)
        quantizer.get_quant_config()
        if self.post_processes:
            return self._save_improved(Path(save_directory), pack_weights=pack_weights)
        return self._export(save_directory, quantizer, dequantized=False, pack_weights=pack_weights)

    def _save_improved(self, path: Path, *, pack_weights: bool) -> Path:
        self._finished()
        if self.quantized_model is None:
            raise ConfigError(
                "save_quantized_model",
                [
                    "post_processes have not run to their end. Call run_post_processes(), or set "
                    "post_processes = [] to save what was quantized."
                ],
            )
        if not pack_weights:
            raise ConfigError(
                "save_quantized_model",
                ["pack_weights=False: models are packed when they are post-processed."],
            )
        source = self.model_config.source.directory
        save_live_model(self.quantized_model, path, source_dir=source)
        return path

    def save_dequantized_model(self, path: str | Path, quantizer: Quantizer | None = None) -> Path:
        """Write the model with dequantized weights in its own dtype, block by block.

        The weights are those of the results, before any of ``post_processes``.

        Args:
            path: New directory.
            quantizer: Whose results; default: the Runner's.
        """
        return self._export(path, self._which(quantizer), dequantized=True, pack_weights=True)

    def _export(
        self, path: str | Path, quantizer: Quantizer, *, dequantized: bool, pack_weights: bool
    ) -> Path:
        session, path = self._finished(), Path(path)
        require_no_checkpoint(path)
        writer = session.writer(
            path, dequantized=dequantized, pack_weights=pack_weights, quantizer=quantizer
        )
        session.export(writer, self._results(quantizer))
        return path

    def save_quantization_results(
        self, path: str | Path, quantizer: Quantizer | None = None
    ) -> None:
        """Write the results as tensors and plain values, see ``Quantizer.load_results``."""
        self._results(quantizer)
        self._which(quantizer).save_results(path)

    def save_quantization_statistics(
        self, path: str | Path, quantizer: Quantizer | None = None
    ) -> None:
        """Write time and errors of every layer as JSON."""
        result_files.save_statistics(self._results(quantizer), path)

    def print_quantization_results(self, quantizer: Quantizer | None = None) -> None:
        """Log time and errors of every layer; a dash where nothing was measured.

        Args:
            quantizer: Whose results; default: those of every quantizer of the Runner.
        """
        chosen = [quantizer] if quantizer or self.quantizers is None else self.quantizers
        for method in chosen:
            logger.info("%s", self._which(method).name)
            for name, result in self._results(method).items():
                logger.info("%s  %s", name, result_files.statistics_line(result))

    # Live models

    def create_quantized_model(
        self,
        pack_weights: bool = True,
        quantizer: Quantizer | None = None,
        use_gemlite: bool | None = None,
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The whole quantized model on the CPU, and its tokenizer.

        Args:
            pack_weights: Keep codes packed.
            quantizer: Default: the Runner's.
            use_gemlite: Accepted for compatibility; layers run by their own code.

        Raises:
            NotImplementedError: The method has no inference layer.
        """
        del use_gemlite
        quantizer = self._which(quantizer)
        config = quantizer.get_quant_config()
        self._results(quantizer)
        model = self.model_config.load_model(device_map="cpu")
        quantizer.apply_results_to_model(model, pack_weights=pack_weights)
        num_blocks = model.config.get_text_config().num_hidden_layers
        model.config.quantization_config = quantizer.finalize_quant_config_for_save(
            config, list(quantizer.results), num_blocks
        )
        let_peft_know_quantized_layers()
        return model, self.model_config.load_tokenizer()

    def update_model_weights(
        self, model: PreTrainedModel, quantizer: Quantizer | None = None
    ) -> None:
        """Replace the weights of a live model by their dequantized values, in place."""
        for name, result in self._results(quantizer).items():
            weight = model.get_submodule(name).weight
            weight.data.copy_(result.dequantize(weight.device))

    # Evaluating

    def calculate_perplexity(  # noqa: PLR0913 - the documented signature
        self,
        original_model: bool = False,
        dequantized_model: bool = False,
        quantized_model: bool = True,
        dataset_name: str = "Salesforce/wikitext",
        dataset_config: str | None = "wikitext-2-raw-v1",
        split: str = "test",
        max_samples: int | None = None,
        max_length: int = 2048,
        stride: int = 2048,
        quantizer: Quantizer | None = None,
    ) -> tuple[float | None, float | None, float | None]:
        """Perplexity of the original, the dequantized and the quantized model.

        A method without an inference layer is evaluated dequantized where quantized was asked.

        Args:
            original_model: Evaluate the original.
            dequantized_model: Evaluate with dequantized weights.
            quantized_model: Evaluate with quantized layers.
            dataset_name: Data set, or a local file.
            dataset_config: Its configuration.
            split: Its split.
            max_samples: Rows to use at most.
            max_length: Tokens per window.
            stride: Tokens from one window to the next.
            quantizer: Default: the Runner's.

        Returns:
            One number each, None for what was not asked for.
        """
        quantizer = self._which(quantizer)
        if quantized_model and self.quantized_model is None and not has_format(quantizer):
            logger.info("%s has no inference layer: evaluating dequantized", quantizer.name)
            dequantized_model, quantized_model = True, False

        tokenizer = self.model_config.load_tokenizer()
        text = (dataset_name, dataset_config, split, max_samples, max_length, stride)

        def perplexity(load: Callable[[], PreTrainedModel]) -> float:
            model = load()
            with dense_layers(model, model.dtype):
                return calculate_perplexity(model, tokenizer, self.model_config, *text)

        return (
            perplexity(self.model_config.load_model) if original_model else None,
            perplexity(lambda: self._dequantized(quantizer)) if dequantized_model else None,
            perplexity(lambda: self._quantized(quantizer)) if quantized_model else None,
        )

    def _dequantized(self, quantizer: Quantizer) -> PreTrainedModel:
        model = self.model_config.load_model()
        self.update_model_weights(model, quantizer)
        return model

    def _quantized(self, quantizer: Quantizer) -> PreTrainedModel:
        if self.quantized_model is not None:
            return self.quantized_model
        model, _ = self.create_quantized_model(quantizer=quantizer)
        return model.to(self.model_config.get_device())
