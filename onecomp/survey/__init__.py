"""What runs before the first block of a method that gives each layer a child of its own."""

from onecomp.survey.assigning import SurveyPlan as SurveyPlan
from onecomp.survey.assigning import assign as assign
