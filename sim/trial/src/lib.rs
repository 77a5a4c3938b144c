//! A guest without an operating system that tries to get at the monitor inside it.
//!
//! The program (`main.rs`) is a kernel by Linux's boot protocol, which the hypervisor starts like any other. It calls the
//! monitor through the gate, counts what that costs, and then does what an attacker with the guest's kernel in his hands
//! would. It says on the serial port what it found; `vmsight-sim-image` has the tests that read it.
#![no_std]
