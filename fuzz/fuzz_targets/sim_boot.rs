//! What the hypervisor of `sim` is started with: a boot loader's information, the firmware's tables, a kernel, a monitor's
//! image, an instruction. Any bytes are read, or refused; the first one says as what they are.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmsight_sim_hypervisor::e820::CAPACITY;
use vmsight_sim_hypervisor::linux::Kernel;
use vmsight_sim_hypervisor::multiboot::Information;
use vmsight_sim_hypervisor::{PAGE, PROCESSORS, acpi, store, views};

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else {
        return;
    };
    match kind % 5 {
        0 => information(data),
        1 => tables(data),
        2 => kernel(data),
        3 => image(data),
        _ => instruction(data),
    }
});

fn information(data: &[u8]) {
    let information = Information::new(data);
    let text: usize = information.modules().map(|m| m.command_line.len()).sum();
    // Each is in a tag of its own.
    assert!(text <= data.len() && information.modules().count() <= data.len() / 16);
    let mut map = information.memory_map();
    assert!(map.entries().len() <= CAPACITY);
    let _ = information.rsdt();
    let own = 0x800_0000..0x880_0000;
    if map.reserve(own.clone()) {
        assert!(!map.touches_ram(&own));
        if let Some(at) = map.find(0x10_0000, PAGE, PAGE, std::slice::from_ref(&own)) {
            let found = at..at + PAGE;
            assert!(at % PAGE == 0 && map.is_ram(&found) && !own.contains(&at));
        }
    }
}

fn tables(data: &[u8]) {
    let memory = |at: u64, length: usize| {
        let at = usize::try_from(at).ok()?;
        data.get(at..at.checked_add(length)?)
    };
    if let Some(found) = acpi::processors(0, memory) {
        let named = found.apics().count();
        assert_eq!(named, (found.enabled as usize).min(PROCESSORS));
    }
}

fn kernel(data: &[u8]) {
    let Ok(kernel) = Kernel::parse(data) else { return };
    assert!(kernel.memory >= kernel.code().len() as u64 && kernel.align.is_power_of_two());
    let mut map = vmsight_sim_hypervisor::e820::MemoryMap::default();
    map.add(0x10_0000..0x1000_0000, vmsight_sim_hypervisor::e820::Kind::RAM);
    if let Some(at) = kernel.place(&map, &[]) {
        assert!(at >= 0x10_0000 && at + kernel.memory <= 0x1000_0000);
    }
    let mut page = [0; 4096];
    let _ = kernel.zero_page(&mut page, &map, 0x200_0000..0x200_1000, (0x1_1000, 7));
}

fn image(data: &[u8]) {
    let Ok(header) = views::header(data) else { return };
    let end = header.base + header.text + header.data;
    assert!(data.len() as u64 <= header.text && end <= 1 << 31);
    assert!((header.base..header.base + header.text).contains(&header.entry));
    assert!((header.base + header.text..end).contains(&header.state));
}

fn instruction(data: &[u8]) {
    if let Some(store) = store::decode(data) {
        assert!((2..=15).contains(&store.length));
    }
}
