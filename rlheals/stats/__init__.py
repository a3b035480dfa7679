"""Intervals, paired tests, corrections and power; NumPy and SciPy only."""

from __future__ import annotations

from rlheals.stats.intervals import Interval as Interval
from rlheals.stats.intervals import bootstrap_hands as bootstrap_hands
from rlheals.stats.intervals import clopper_pearson as clopper_pearson
from rlheals.stats.intervals import wilson as wilson
from rlheals.stats.multiplicity import holm as holm
from rlheals.stats.paired import PairCounts as PairCounts
from rlheals.stats.paired import PairedDifference as PairedDifference
from rlheals.stats.paired import PairedRatio as PairedRatio
from rlheals.stats.paired import difference_from_counts as difference_from_counts
from rlheals.stats.paired import mcnemar_exact as mcnemar_exact
from rlheals.stats.paired import mcnemar_pairs as mcnemar_pairs
from rlheals.stats.paired import pair_counts as pair_counts
from rlheals.stats.paired import paired_difference as paired_difference
from rlheals.stats.paired import paired_ratio as paired_ratio
from rlheals.stats.paired import ratio_from_counts as ratio_from_counts
from rlheals.stats.power import minimum_effect_paired as minimum_effect_paired
from rlheals.stats.power import minimum_effect_unpaired as minimum_effect_unpaired
from rlheals.stats.power import power_mcnemar as power_mcnemar
from rlheals.stats.power import power_unpaired as power_unpaired
from rlheals.stats.seeds import SeedMean as SeedMean
from rlheals.stats.seeds import permutation_p_value as permutation_p_value
from rlheals.stats.seeds import rank_correlation as rank_correlation
from rlheals.stats.seeds import seed_mean as seed_mean
