//! The few bytes by which a hook reaches the monitor and comes back. The same virtual page is another page in each view:
//!
//! | offset | view of the guest | view of the gate | view of the monitor |
//! |---|---|---|---|
//! | page before, end | the stub: VMFUNC(1) | | |
//! | 0 | | arms the list, CLI, CR3, VMFUNC(2) | |
//! | [`LANDING`] | | | disarms the list, jumps to the monitor |
//! | [`LEAVING`] | | | VMFUNC(1) |
//! | [`RESTORING`] | | CR3, VMFUNC(0) | |
//! | [`RETURNING`] | back to the hook | | |
//! | [`REFUSING`] | back from the hooked function | | |
//!
//! All other bytes are INT3. In the view of the gate nothing else can be executed, and every CR3 leads to the same
//! translation, so what runs there is what an attacker can make of this page from any offset with any registers. The order
//! is what matters: the list is armed first, and what follows masks interrupts and loads our CR3. Who lands after the
//! arming finds nothing armed; who lands before it does all the rest. The value that arms is in the instruction, not in a
//! register that an attacker could have loaded.

/// Bytes of a page of code.
pub type Page = [u8; 4096];

/// INT3.
const FILL: u8 = 0xcc;
const VMFUNC: [u8; 3] = [0x0f, 0x01, 0xd4];

/// Where a hook calls the stub, in the page before the gate.
pub const STUB: usize = 4096 - 17;
/// Where the view of the monitor goes on after the gate.
pub const LANDING: usize = 31;
/// Where the monitor jumps to when it is done.
pub const LEAVING: usize = 0x76;
/// Where the view of the gate goes on after the monitor.
pub const RESTORING: usize = 0x80;
/// Where the guest goes on.
pub const RETURNING: usize = RESTORING + 9;
/// Where it goes on with a hooked function that the monitor refused: returns R10 from it.
pub const REFUSING: usize = 0xc0;
/// Where the landing finds the monitor's address.
const ENTRY: usize = 0x100;

/// Writes code into a page.
struct Writer<'a> {
    page: &'a mut Page,
    at: usize,
}

impl<'a> Writer<'a> {
    fn new(page: &'a mut Page, at: usize) -> Self {
        Self { page, at }
    }

    fn put(&mut self, bytes: &[u8]) -> &mut Self {
        if let Some(slot) = self.page.get_mut(self.at..self.at + bytes.len()) {
            slot.copy_from_slice(bytes);
        }
        self.at += bytes.len();
        self
    }

    /// `mov dword [rip + …], value`, to `target`, a distance from the begin of the page.
    fn store(&mut self, target: i32, value: u32) -> &mut Self {
        let next = self.at as i32 + 10;
        self.put(&[0xc7, 0x05])
            .put(&(target - next).to_le_bytes())
            .put(&value.to_le_bytes())
    }
}

/// What the gates are made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// EPT pointer of the monitor's view. Below 4 GiB: the store that arms has 32 bits, the others stay zero.
    pub sim_pointer: u32,
    /// Our CR3. Below 2 GiB.
    pub cr3: u32,
    /// The list of EPT pointers, as a distance from the gate's page in virtual memory.
    pub list: i32,
    /// Virtual address of the monitor's entry.
    pub entry: u64,
}

/// The two pages of the guest: the stub, and where it comes back.
pub fn stub(first: &mut Page, second: &mut Page) {
    first.fill(FILL);
    second.fill(FILL);
    Writer::new(first, STUB)
        .put(&[0x4c, 0x8b, 0x14, 0x24]) // mov r10, [rsp]
        .put(&[0x51, 0x9c, 0xfa]) // push rcx; pushfq; cli
        .put(&[0x31, 0xc0]) // xor eax, eax
        .put(&[0xb9, 1, 0, 0, 0]) // mov ecx, 1
        .put(&VMFUNC);
    Writer::new(second, RETURNING).put(&[0x9d, 0x59, 0xc3]); // popfq; pop rcx; ret
    Writer::new(second, REFUSING).put(&[0x4c, 0x89, 0xd0, 0xc3]); // mov rax, r10; ret
}

/// The gate.
pub fn gate(page: &mut Page, addresses: &Addresses) {
    // mov cr3, rcx; or, in the build that serves as a control, nothing: the guest's page tables are used.
    let load = if cfg!(feature = "guest-tables") {
        [0x0f, 0x1f, 0x00]
    } else {
        [0x0f, 0x22, 0xd9]
    };
    page.fill(FILL);
    Writer::new(page, 0)
        .store(
            addresses.list + 8 * vmsight_sim_abi::view::SIM as i32,
            addresses.sim_pointer,
        )
        .put(&[0xfa]) // cli
        .put(&[0x41, 0x0f, 0x20, 0xdb]) // mov r11, cr3
        .put(&[0xb9]) // mov ecx, …
        .put(&addresses.cr3.to_le_bytes())
        .put(&load)
        .put(&[0xb9, 2, 0, 0, 0]) // mov ecx, 2
        .put(&VMFUNC);
    Writer::new(page, RESTORING)
        .put(&[0x41, 0x0f, 0x22, 0xdb]) // mov cr3, r11
        .put(&[0x31, 0xc9]) // xor ecx, ecx
        .put(&VMFUNC);
}

/// The landing.
pub fn landing(page: &mut Page, addresses: &Addresses) {
    page.fill(FILL);
    let mut writer = Writer::new(page, LANDING);
    writer.store(addresses.list + 8 * vmsight_sim_abi::view::SIM as i32, 0);
    let next = writer.at as i32 + 6;
    writer
        .put(&[0xff, 0x25]) // jmp [rip + …]
        .put(&(ENTRY as i32 - next).to_le_bytes());
    Writer::new(page, LEAVING)
        .put(&[0x31, 0xc0]) // xor eax, eax
        .put(&[0xb9, 1, 0, 0, 0]) // mov ecx, 1
        .put(&VMFUNC);
    Writer::new(page, ENTRY).put(&addresses.entry.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Register};

    use super::*;

    const VA: u64 = 0xffff_ffff_8123_4000;
    const ADDRESSES: Addresses = Addresses {
        sim_pointer: 0x0812_301e,
        cr3: 0x0812_4000,
        list: 0x5000,
        entry: 0x1000_0040,
    };

    fn page(make: impl FnOnce(&mut Page)) -> Page {
        let mut page = [0; 4096];
        make(&mut page);
        page
    }

    fn decode(page: &Page, from: usize) -> impl Iterator<Item = Instruction> {
        let mut decoder = Decoder::with_ip(64, &page[from..], VA + from as u64, DecoderOptions::NONE);
        core::iter::from_fn(move || decoder.can_decode().then(|| decoder.decode()))
    }

    fn codes(page: &Page, from: usize, count: usize) -> std::vec::Vec<Code> {
        decode(page, from).take(count).map(|i| i.code()).collect()
    }

    #[test]
    fn each_view_goes_on_where_the_other_left() {
        let gate = page(|p| super::gate(p, &ADDRESSES));
        let ends: std::vec::Vec<u64> = decode(&gate, 0)
            .take(7)
            .filter(|i| i.code() == Code::Vmfunc)
            .map(|i| i.next_ip() - VA)
            .collect();
        assert_eq!(ends, [LANDING as u64]);
        let landing = page(|p| super::landing(p, &ADDRESSES));
        let first = decode(&landing, LANDING).next().unwrap();
        assert_eq!(first.code(), Code::Mov_rm32_imm32);
        assert_eq!(first.ip_rel_memory_address(), VA + 0x5010);
        assert_eq!(first.immediate32(), 0);
        let jump = decode(&landing, LANDING).nth(1).unwrap();
        assert_eq!(jump.ip_rel_memory_address(), VA + ENTRY as u64);
        let leave = decode(&landing, LEAVING).nth(2).unwrap();
        assert_eq!(
            (leave.code(), leave.next_ip() - VA),
            (Code::Vmfunc, RESTORING as u64)
        );
        let restore = decode(&gate, RESTORING).nth(2).unwrap();
        assert_eq!(
            (restore.code(), restore.next_ip() - VA),
            (Code::Vmfunc, RETURNING as u64)
        );
        let (mut first, mut second) = ([0; 4096], [0; 4096]);
        stub(&mut first, &mut second);
        let call = decode(&first, STUB).nth(6).unwrap();
        assert_eq!((call.code(), call.next_ip() - VA), (Code::Vmfunc, 4096));
        assert_eq!(
            codes(&second, RETURNING, 3),
            [Code::Popfq, Code::Pop_r64, Code::Retnq]
        );
        assert_eq!(codes(&second, REFUSING, 2), [Code::Mov_rm64_r64, Code::Retnq]);
    }

    /// From whatever byte of the gate's page execution begins, nothing reaches a VMFUNC with the list armed but what has
    /// masked interrupts and loaded our CR3 after the arming.
    #[test]
    fn no_offset_skips_a_step() {
        let gate = page(|p| super::gate(p, &ADDRESSES));
        let mut armed_from = std::vec::Vec::new();
        for offset in 0..4096 {
            let (mut armed, mut masked, mut ours, mut cr3) = (false, false, false, false);
            for instruction in decode(&gate, offset) {
                let writes_memory = instruction.op0_kind() == iced_x86::OpKind::Memory;
                match instruction.code() {
                    Code::INVALID | Code::Int3 => break,
                    Code::Vmfunc => {
                        if armed {
                            assert!(masked && cr3, "offset {offset} skips a step");
                            armed_from.push(offset);
                        }
                        break;
                    }
                    Code::Mov_rm32_imm32 if instruction.memory_base() == Register::RIP => {
                        assert_eq!(instruction.ip_rel_memory_address(), VA + 0x5010);
                        assert_eq!(instruction.immediate32(), ADDRESSES.sim_pointer);
                        armed = true;
                        (masked, cr3) = (false, false);
                    }
                    Code::Cli => masked = true,
                    Code::Sti | Code::Popfq => masked = false,
                    Code::Mov_r32_imm32 if instruction.op0_register() == Register::ECX => {
                        ours = instruction.immediate32() == ADDRESSES.cr3;
                    }
                    Code::Mov_cr_r64 => cr3 = ours && instruction.op1_register() == Register::RCX,
                    _ => {
                        let flow = instruction.flow_control();
                        assert_eq!(flow, FlowControl::Next, "offset {offset}: {instruction}");
                        assert!(!writes_memory || offset != 0, "offset {offset}: {instruction}");
                    }
                }
            }
        }
        assert_eq!(armed_from, [0]);
    }
}
