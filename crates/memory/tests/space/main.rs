//! Virtual memory over every kind of guest memory: against a model, with tables that change, from many threads.

#![allow(clippy::unwrap_used, reason = "a test")]

mod absent;
mod changing;
mod image;
mod model;
mod strings;
