//! The target description: which registers the stub has, and where they lie in its `g` packet.

use vmsight_arch::registers::Registers;

use super::packet::from_hex;

/// Most registers taken from a description.
const MAX_REGISTERS: usize = 1024;

/// One register of the description.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Register {
    name: String,
    bits: usize,
}

/// The files that a description includes.
pub(super) fn includes(xml: &str) -> Vec<String> {
    without_comments(xml)
        .split("<xi:include")
        .skip(1)
        .take(64)
        .filter_map(|t| attribute(t, "href"))
        .collect()
}

/// The registers of a description in their order, which is the order of the `g` packet. QEMU's has some in comments
/// (the bases of CS, SS, DS and ES), which the packet does not carry.
pub(super) fn registers(xml: &str) -> Vec<Register> {
    without_comments(xml)
        .split("<reg ")
        .skip(1)
        .take(MAX_REGISTERS)
        .filter_map(|text| {
            let bits = attribute(text, "bitsize")?.parse().ok().filter(|b| *b <= 4096)?;
            Some(Register {
                name: attribute(text, "name")?,
                bits,
            })
        })
        .collect()
}

/// The text without its comments; one without end is a comment to the end.
fn without_comments(xml: &str) -> String {
    let mut parts = xml.split("<!--");
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        text.push_str(part.split_once("-->").map_or("", |(_, rest)| rest));
    }
    text
}

/// The value of an attribute of the element that `text` is the rest of.
fn attribute(text: &str, name: &str) -> Option<String> {
    let element = text.split('>').next()?;
    let (_, rest) = element.split_once(&format!("{name}=\""))?;
    Some(rest.split_once('"')?.0.to_owned())
}

/// The number of a register, by which it is written, and its size in bytes.
pub(super) fn index(registers: &[Register], name: &str) -> Option<(usize, usize)> {
    let at = registers.iter().position(|r| r.name == name)?;
    Some((at, registers.get(at)?.bits.div_ceil(8)))
}

/// Takes the registers out of a `g` packet's answer. `None` where it does not have those of an x86-64 machine.
/// Registers that the stub does not know (`x`) and what it does not carry (descriptor tables, segment limits, MSRs
/// but the two GS bases) stay as in [`Registers::default`].
pub(super) fn parse_g(vcpu: u32, registers: &[Register], answer: &[u8]) -> Option<Registers> {
    let mut result = Registers {
        vcpu,
        ..Registers::default()
    };
    let mut at = 0;
    let (mut rip, mut cr0, mut cr3, mut cr4) = (None, None, None, None);
    for register in registers {
        let end = at + register.bits.div_ceil(8) * 2;
        let Some(text) = answer.get(at..end) else { break };
        at = end;
        let Some(value) = from_hex(text).and_then(little_endian) else {
            continue;
        };
        if let Some(slot) = vmsight_arch::registers::GPR_NAMES
            .iter()
            .position(|n| *n == register.name)
            .and_then(|i| result.gprs.get_mut(i))
        {
            *slot = value;
            continue;
        }
        let selector = (value & 0xffff) as u16;
        match register.name.as_str() {
            "rip" => rip = Some(value),
            "eflags" => result.rflags = value,
            "cs" => result.cs.selector = selector,
            "ss" => result.ss.selector = selector,
            "ds" => result.ds.selector = selector,
            "es" => result.es.selector = selector,
            "fs" => result.fs.selector = selector,
            "gs" => result.gs.selector = selector,
            "fs_base" => result.fs.base = value,
            "gs_base" => result.gs.base = value,
            "k_gs_base" => result.kernel_gs_base = Some(value),
            "cr0" => cr0 = Some(value),
            "cr2" => result.cr2 = value,
            "cr3" => cr3 = Some(value),
            "cr4" => cr4 = Some(value),
            "efer" => result.efer = value,
            _ => {}
        }
    }
    (result.rip, result.cr0, result.cr3, result.cr4) = (rip?, cr0?, cr3?, cr4?);
    Some(result)
}

/// Up to 8 bytes; longer ones (vectors) are of no use here.
fn little_endian(bytes: Vec<u8>) -> Option<u64> {
    let mut all = [0; 8];
    all.get_mut(..bytes.len())?.copy_from_slice(&bytes);
    Some(u64::from_le_bytes(all))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The shape of QEMU's gdb-xml/i386-64bit.xml.
    fn description() -> String {
        let mut xml =
            String::from("<feature name=\"org.gnu.gdb.i386.core\"><flags id=\"x\" size=\"4\"></flags>");
        for name in vmsight_arch::registers::GPR_NAMES {
            xml.push_str(&format!("<reg name=\"{name}\" bitsize=\"64\" type=\"int64\"/>\n"));
        }
        // As QEMU's own has it, from 4.2 to 10.
        xml.push_str("<!-- bases --><!--reg name=\"cs_base\" bitsize=\"64\"/>\n<reg name=\"ss_base\" bitsize=\"64\"/-->");
        for (name, bits) in [
            ("rip", 64),
            ("eflags", 32),
            ("cs", 32),
            ("gs_base", 64),
            ("k_gs_base", 64),
        ] {
            xml.push_str(&format!("<reg name=\"{name}\" bitsize=\"{bits}\"/>"));
        }
        for name in ["cr0", "cr2", "cr3", "cr4", "cr8", "efer"] {
            xml.push_str(&format!("<reg name=\"{name}\" bitsize=\"64\"/>"));
        }
        xml + "</feature>"
    }

    #[test]
    fn values_by_name() {
        let registers = registers(&description());
        assert_eq!(registers.len(), 27);
        let mut answer = String::new();
        for (i, register) in registers.iter().enumerate() {
            let value = (i as u64 + 1).to_le_bytes();
            answer.push_str(&super::super::packet::to_hex(&value[..register.bits / 8]));
        }
        let parsed = parse_g(3, &registers, answer.as_bytes()).unwrap();
        assert_eq!(
            (parsed.vcpu, parsed.rax(), parsed.r15(), parsed.rip),
            (3, 1, 16, 17)
        );
        assert_eq!(
            (parsed.cs.selector, parsed.gs.base, parsed.kernel_gs_base),
            (19, 20, Some(21))
        );
        assert_eq!(
            (parsed.cr0, parsed.cr3, parsed.cr4, parsed.efer),
            (22, 24, 25, 27)
        );
        // Without the control registers it is no use for a monitor.
        assert!(parse_g(0, &registers, &answer.as_bytes()[..300]).is_none());
        assert!(parse_g(0, &registers, b"E14").is_none());
    }

    #[test]
    fn includes_and_nonsense() {
        let xml = "<target><xi:include href=\"a.xml\"/><xi:include href=\"b.xml\"/></target>";
        assert_eq!(includes(xml), ["a.xml", "b.xml"]);
        assert_eq!(without_comments("a<!--b-->c<!-- d --> e<!--f"), "ac e");
        assert!(registers("<reg name=\"x\"/><reg bitsize=\"99999999999999\" name=\"y\"/><reg ").is_empty());
    }
}
