"""How good a model is: perplexity on text."""

from onecomp.evaluation.perplexity import PerplexityResult as PerplexityResult
from onecomp.evaluation.perplexity import calculate_perplexity as calculate_perplexity
from onecomp.evaluation.perplexity import perplexity_of_tokens as perplexity_of_tokens
from onecomp.evaluation.texts import load_texts as load_texts
from onecomp.evaluation.texts import tokenize_texts as tokenize_texts
