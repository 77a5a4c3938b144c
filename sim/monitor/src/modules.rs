//! Modules, as they are given to the kernel: the whole file is in its memory, and nothing of it was looked at yet.

use sha2::{Digest, Sha256};
use vmsight_sim_abi::{Event, Handler, Kind, LISTED_MODULES_ONLY, Member, Verdict, Watch};

use crate::handlers::{errno, refuse};
use crate::task::{event, pointer, put_text};
use crate::{Context, Memory};

/// No module of a distribution is longer. Of a longer one no hash is made: while it is, the guest does nothing else.
const MOST: u64 = 64 << 20;

/// `security_kernel_post_read_file(file, bytes, length, id)`.
pub(crate) fn file<M: Memory>(context: &Context<'_, M>, watch: &mut Watch) -> Verdict {
    // The identifier is an enumeration: 4 bytes.
    let id = context.rest.rcx.map(|id| u64::from(id as u32));
    if id.is_some() && id != watch.policy.member(Member::ReadingModule) {
        return Verdict::Continue;
    }
    let mut event = event(context, &watch.policy, Kind::Module);
    let name = || {
        let entry = pointer(context, &watch.policy, context.frame.rdi, Member::FileDentry)?;
        pointer(context, &watch.policy, entry, Member::DentryName)
    };
    if let Some(name) = name() {
        put_text(context, &mut event, name);
    }
    judge(
        context,
        watch,
        event,
        (context.frame.rsi, context.frame.rdx),
        Handler::ModuleFile,
    )
}

/// `security_kernel_post_load_data(bytes, length, id, description)`.
pub(crate) fn data<M: Memory>(context: &Context<'_, M>, watch: &mut Watch) -> Verdict {
    if Some(u64::from(context.frame.rdx as u32)) != watch.policy.member(Member::LoadingModule) {
        return Verdict::Continue;
    }
    let event = event(context, &watch.policy, Kind::Module);
    judge(
        context,
        watch,
        event,
        (context.frame.rdi, context.frame.rsi),
        Handler::ModuleData,
    )
}

fn judge<M: Memory>(
    context: &Context<'_, M>,
    watch: &mut Watch,
    mut event: Event,
    (address, length): (u64, u64),
    handler: Handler,
) -> Verdict {
    let hash = hash(context, address, length);
    let listed = hash.is_some_and(|hash| watch.policy.modules().contains(&hash));
    let verdict = if listed || watch.policy.flags & LISTED_MODULES_ONLY == 0 {
        Verdict::Continue
    } else {
        refuse(watch, handler, None)
    };
    event.errno = errno(verdict);
    let state = match hash {
        Some(_) => u64::from(listed),
        None => 2,
    };
    for (word, eight) in event
        .words
        .iter_mut()
        .zip(hash.unwrap_or([0; 32]).chunks_exact(8))
    {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(eight);
        *word = u64::from_le_bytes(bytes);
    }
    let [_, _, _, _, bytes, told, _] = &mut event.words;
    (*bytes, *told) = (length, state);
    watch.ring.push(&event);
    verdict
}

/// SHA-256 over memory; `None` if not all of it can be read.
fn hash<M: Memory>(context: &Context<'_, M>, address: u64, length: u64) -> Option<[u8; 32]> {
    const CHUNK: u64 = 512;
    if length > MOST {
        return None;
    }
    let mut digest = Sha256::new();
    let mut chunk = [0; CHUNK as usize];
    for at in (0..length).step_by(CHUNK as usize) {
        let part = chunk.get_mut(..(length - at).min(CHUNK) as usize)?;
        context.bytes(address.wrapping_add(at), part)?;
        digest.update(part);
        context.getting_on();
    }
    Some(digest.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{Guest, guest_at};

    const BYTES: u64 = 0x4_0003;

    /// A guest with a module in its memory, of an odd length at an odd address, and the module's hash.
    fn guest() -> (Guest, [u8; 32]) {
        let mut guest = Guest::new();
        let module: [u8; 5001] = core::array::from_fn(|n| (n % 251) as u8);
        guest.put(guest_at(BYTES), &module);
        (guest, Sha256::digest(module).into())
    }

    #[test]
    fn a_module_is_told_by_its_hash() {
        let (mut guest, hash) = guest();
        let file = guest.file(0x3_0000, 0o100_644, 0);
        let load = |guest: &mut Guest, id| guest.call(Handler::ModuleFile, [file, guest_at(BYTES), 5001, id]);
        // A firmware is none of ours.
        assert_eq!(load(&mut guest, 1), Verdict::Continue);
        assert!(guest.told().is_empty());
        assert_eq!(load(&mut guest, 2), Verdict::Continue);
        let line = guest.told().remove(0);
        assert!(line.contains(" bytes=5001 listed=no file=\"dummy.ko\""), "{line}");
        let mut hex = std::string::String::new();
        for byte in hash {
            hex.push_str(&std::format!("{byte:02x}"));
        }
        assert!(line.contains(&hex), "{line}");
    }

    #[test]
    fn only_listed_modules_are_let_pass() {
        let (mut guest, hash) = guest();
        guest.watch.policy.flags = LISTED_MODULES_ONLY;
        guest.may_refuse(Handler::ModuleData, -1);
        let load =
            |guest: &mut Guest, length| guest.call(Handler::ModuleData, [guest_at(BYTES), length, 3, 0]);
        assert_eq!(load(&mut guest, 5001), Verdict::Refuse(-1));
        assert!(guest.watch.policy.allow_module(hash));
        assert_eq!(load(&mut guest, 5001), Verdict::Continue);
        assert_eq!(load(&mut guest, 5000), Verdict::Refuse(-1));
        // Longer than there is memory, than is looked at, than there can be.
        for length in [1 << 20, MOST + 1, u64::MAX] {
            assert_eq!(load(&mut guest, length), Verdict::Refuse(-1));
        }
        let lines = guest.told();
        assert!(lines[1].contains("listed=yes") && !lines[1].contains("refused"));
        assert!(lines[2].contains("listed=no") && lines[2].ends_with("refused=1"));
        assert!(
            lines[3..]
                .iter()
                .all(|l| l.contains("listed=unreadable") && l.ends_with("refused=1"))
        );
        assert_eq!(lines.len(), 6);
        // What was hashed three times shows that it gets on.
        let progress = guest.progress.get();
        assert!(progress >= 3 * (5001 / 512), "{progress}");
    }

    extern crate std;
}
