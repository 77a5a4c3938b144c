//! The host's side of the guest: what it does and how long that took, through the file that is its memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use crate::image::{self, Image};

/// What the guest does in a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Calls a function that does nothing: what a round costs by itself.
    Nothing,
    /// Calls the function that is to be hooked.
    Call,
    /// Writes to the page that is to be watched.
    Write,
    /// Writes LSTAR.
    Msr,
    /// Writes to a port where nothing listens.
    Port,
}

impl Operation {
    fn function(self, image: &Image) -> u64 {
        match self {
            Self::Nothing => image.nothing,
            Self::Call => image.function,
            Self::Write => image.write,
            Self::Msr => image.msr,
            Self::Port => image.port,
        }
    }
}

/// A running guest, by its memory.
#[derive(Debug)]
pub struct Timer {
    memory: File,
    image: Image,
    /// Ticks of its time-stamp counter in a nanosecond.
    rate: f64,
}

/// What rounds took.
#[derive(Clone, Debug, PartialEq)]
pub struct Samples {
    /// Nanoseconds of each round, in their order.
    pub nanoseconds: Vec<f64>,
}

impl Timer {
    /// Takes the memory of a guest that was started with `image`, waits until it runs, and learns the rate of its counter.
    ///
    /// # Errors
    /// Where it does not run within `patience`, is not `alive` any more, or its memory cannot be read.
    pub fn start(
        memory: File,
        image: Image,
        patience: Duration,
        mut alive: impl FnMut() -> bool,
    ) -> io::Result<Self> {
        let mut timer = Self {
            memory,
            image,
            rate: 0.0,
        };
        timer.wait(patience, "the guest does not run", |timer| {
            match timer.word(image::CLOCK)? {
                0 if !alive() => Err(io::Error::other("it ended at once")),
                clock => Ok(clock != 0),
            }
        })?;
        let (first, begin) = timer.tick(patience)?;
        std::thread::sleep(Duration::from_millis(100));
        let (last, end) = timer.tick(patience)?;
        timer.rate = last.saturating_sub(first) as f64 / end.duration_since(begin).as_nanos() as f64;
        if timer.rate.is_normal() {
            Ok(timer)
        } else {
            Err(io::Error::other("the guest's time-stamp counter stands still"))
        }
    }

    /// The guest's code.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Has the guest do so many rounds, at most [`image::MOST`], and waits for their end.
    ///
    /// # Errors
    /// Where it is not through within `patience`, or its memory cannot be read.
    pub fn run(&self, operation: Operation, rounds: u64, patience: Duration) -> io::Result<Samples> {
        self.begin(operation, rounds)?;
        self.finish(rounds, patience)
    }

    /// Has the guest begin so many rounds, at most [`image::MOST`].
    ///
    /// # Errors
    /// Where its memory cannot be written.
    pub fn begin(&self, operation: Operation, rounds: u64) -> io::Result<()> {
        let function = operation.function(&self.image);
        self.memory
            .write_all_at(&function.to_le_bytes(), image::FUNCTION)?;
        self.memory
            .write_all_at(&rounds.min(image::MOST).to_le_bytes(), image::ROUNDS)
    }

    /// Whether the guest is through with its rounds.
    ///
    /// # Errors
    /// Where its memory cannot be read.
    pub fn is_through(&self) -> io::Result<bool> {
        Ok(self.word(image::ROUNDS)? == 0)
    }

    /// Waits for the end of what [`Self::begin`] began.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn finish(&self, rounds: u64, patience: Duration) -> io::Result<Samples> {
        self.wait(patience, "the guest is not through", Self::is_through)?;
        let mut bytes = vec![0; 8 * rounds.min(image::MOST) as usize];
        self.memory.read_exact_at(&mut bytes, image::SAMPLES)?;
        let ticks = bytes.chunks_exact(8).map(|word| {
            word.iter()
                .rev()
                .fold(0, |value, byte| value << 8 | u64::from(*byte))
        });
        Ok(Samples {
            nanoseconds: ticks.map(|ticks| ticks as f64 / self.rate).collect(),
        })
    }

    fn word(&self, at: u64) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.memory.read_exact_at(&mut bytes, at)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// The guest's counter, at a moment when it has just been written.
    fn tick(&self, patience: Duration) -> io::Result<(u64, Instant)> {
        let before = self.word(image::CLOCK)?;
        let end = Instant::now() + patience;
        loop {
            let now = self.word(image::CLOCK)?;
            if now != before {
                return Ok((now, Instant::now()));
            }
            if Instant::now() > end {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the guest stands still"));
            }
            std::hint::spin_loop();
        }
    }

    fn wait(
        &self,
        patience: Duration,
        complaint: &str,
        mut done: impl FnMut(&Self) -> io::Result<bool>,
    ) -> io::Result<()> {
        let end = Instant::now() + patience;
        while !done(self)? {
            if Instant::now() > end {
                return Err(io::Error::new(io::ErrorKind::TimedOut, complaint));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}
