use std::time::Instant;
use vmsight_symbols::kallsyms::*;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let h = |i: usize| u64::from_str_radix(&a[i], 16).unwrap();
    let all = std::fs::read(&a[1]).unwrap();
    let (phys_text, virt_text, ro_start, ro_end, len) = (h(2), h(3), h(4), h(5), h(6));
    let bytes = &all[ro_start as usize..ro_end as usize];
    let image = Image {
        span: virt_text..virt_text + len,
        slide: virt_text.wrapping_sub(0xffff_ffff_8100_0000),
    };
    for _ in 0..4 {
        let t = Instant::now();
        match decode(
            Section {
                bytes,
                address: virt_text + (ro_start - phys_text),
            },
            &image,
        ) {
            Ok(k) => {
                println!(
                    "{:?} {} symbols {:?} damaged {} in {:?}",
                    k.encoding,
                    k.symbols.len(),
                    k.sources,
                    k.damaged_blocks,
                    t.elapsed()
                );
                println!(
                    "init_task {:x?} linux_banner {:x?}",
                    k.symbols.address("init_task"),
                    k.symbols.address("linux_banner")
                );
            }
            Err(e) => println!("{e}"),
        }
    }
}
