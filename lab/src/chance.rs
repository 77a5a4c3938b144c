//! What tests need that leave something to chance, or wait for what they cannot foresee.

use std::time::{Duration, Instant};

/// Xorshift: the same numbers from the same seed.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// Dice with this seed, the lowest bit of which does not count: 0 would give nothing but zeros.
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// A number below `sides`.
    ///
    /// # Panics
    /// If there are no sides.
    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }

    /// One of some.
    ///
    /// # Panics
    /// If there are none.
    pub fn one_of<T: Copy>(&mut self, some: &[T]) -> T {
        let index = usize::try_from(self.roll(some.len() as u64)).expect("below a length");
        *some.get(index).expect("below the length")
    }
}

/// Asks again and again, for five minutes: a machine in a machine in a machine is slow.
///
/// # Panics
/// If it never came.
pub fn patiently<T>(mut what: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(300);
    loop {
        if let Some(got) = what() {
            return got;
        }
        assert!(Instant::now() < end, "it never came");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dice_fall_alike_from_one_seed_and_on_every_side() {
        let rolls = |seed| {
            let mut dice = Dice::new(seed);
            (0..200).map(move |_| dice.roll(6)).collect::<Vec<_>>()
        };
        assert_eq!(rolls(8), rolls(9));
        assert_ne!(rolls(8), rolls(10));
        assert!((0..6).all(|side| rolls(0).contains(&side)));
        let mut dice = Dice::new(0);
        let some: Vec<char> = (0..200).map(|_| dice.one_of(&['a', 'b', 'c'])).collect();
        assert!(['a', 'b', 'c'].iter().all(|one| some.contains(one)));
    }

    #[test]
    fn what_comes_later_is_waited_for() {
        let mut asked = 0;
        let got = patiently(|| {
            asked += 1;
            (asked == 3).then_some(asked)
        });
        assert_eq!(got, 3);
    }
}
