//! What a monitor and the agent in a VMM say to each other: control messages over a Unix socket, events and verdicts
//! through shared memory.
//!
//! The socket carries what is rare: the hello, arming, disarming, counts ([`Request`], [`Reply`]), as JSON behind a length
//! (`frame`). With the hello comes a memfd ([`Shared`]): a ring of [`Record`]s per vCPU, a place for one verdict per
//! vCPU, and the futexes that wake who waits.
//!
//! Neither side believes the other. What stands in shared memory is copied out once and then checked; an index that the
//! other side wrote is compared with one's own. A monitor that lies can only give verdicts that it may give anyway, and
//! an agent that lies (a guest that broke out into its VMM) can make up events, but neither can make the other read or
//! write where it should not, or panic.

mod error;
mod frame;
mod message;
mod record;
mod ring;
mod shared;
mod slot;
mod socket;
mod wait;

pub use error::ChannelError;
pub use frame::{MAX_REPLY, MAX_REQUEST, read, write};
pub use message::{Refusal, Reply, Request, VERSION};
pub use record::{RECORD_WORDS, Record};
pub use ring::{Consumer, Producer};
pub use shared::{Area, MAX_VCPUS, RING_ENTRIES, Shared};
pub use slot::{Answer, VerdictWords};
pub use socket::{accept, connect, listen, receive_descriptor, send_descriptor};
pub use wait::Spin;
