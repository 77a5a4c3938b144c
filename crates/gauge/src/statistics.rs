//! Samples in a few figures.

/// The least, the median, the greatest and the standard deviation of samples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// How many samples there are.
    pub count: usize,
    /// The least.
    pub min: f64,
    /// The one in the middle; the mean of two where their number is even.
    pub median: f64,
    /// The greatest.
    pub max: f64,
    /// Standard deviation, of the samples themselves (divided by their number).
    pub sd: f64,
}

impl Summary {
    /// `None` of no samples.
    #[must_use]
    pub fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len();
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let high = *sorted.get(count / 2)?;
        let low = *sorted.get((count - 1) / 2)?;
        let mean = sorted.iter().sum::<f64>() / count as f64;
        let squares: f64 = sorted.iter().map(|s| (s - mean).powi(2)).sum();
        Some(Self {
            count,
            min,
            median: f64::midpoint(low, high),
            max,
            sd: (squares / count as f64).sqrt(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_known_samples() {
        let summary = Summary::of(&[4.0, 2.0, 9.0, 5.0, 4.0, 5.0, 7.0, 4.0]).unwrap();
        let expected = Summary {
            count: 8,
            min: 2.0,
            median: 4.5,
            max: 9.0,
            sd: 2.0,
        };
        assert_eq!(summary, expected);
        assert_eq!(Summary::of(&[3.0, 1.0, 2.0]).unwrap().median, 2.0);
        assert_eq!(Summary::of(&[]), None);
    }
}
