//! Address types and page-table walkers of the machines a guest can run on.
#![no_std]
