//! The texts on the virtual consoles: what `struct vc_data` keeps of each (drivers/tty/vt/vt.c), shown or not.
//!
//! Where a console is drawn into a framebuffer (fbcon over any graphics driver, and no console at all), its text is in ordinary
//! memory all the time. In VGA's text mode the console in front is in the card's memory only, and read there.

use serde::Serialize;
use vmsight_arch::Gva;
use vmsight_linux::listing::address;
use vmsight_linux::{Kernel, LinuxError, Listing, Problem};
use vmsight_memory::ReadError;

use super::devices::DeviceMemory;
use super::member::{Member, Structure};
use super::vga;

/// `MAX_NR_CONSOLES` (include/uapi/linux/vt.h).
const MAX_CONSOLES: u64 = 63;
/// `VC_MAXCOL` and `VC_MAXROW` of vt.c.
const MAX_COLUMNS: u64 = 32767;
/// Cells of one console that are read: `vc_resize` takes no more than 4 MiB.
const MAX_CELLS: u64 = 2 << 20;
/// How often cells in a card's memory are read that scroll meanwhile.
const ATTEMPTS: usize = 3;
/// A space in grey on black, as an empty cell is.
const BLANK: char = ' ';

/// One virtual console.
#[derive(Clone, Debug, Serialize)]
pub struct Console {
    /// Its name: `tty1`, ….
    pub tty: String,
    /// It is the one in front.
    pub foreground: bool,
    /// Columns.
    pub columns: u64,
    /// Rows.
    pub rows: u64,
    /// The cursor's column and row, from 0.
    pub cursor: Option<(u64, u64)>,
    /// The text, a line for each row, without blanks at the lines' ends and empty lines at the end. `None` where it is not in memory.
    pub text: Option<String>,
    /// The attributes of each row's cells, run by run: the attribute as VGA has it (background, foreground) in hex, and how many cells
    /// have it: `07x80`.
    pub attributes: Vec<String>,
    /// Where the text is: `memory`; `device` where it is the graphics card's. `None` where it could not be read.
    pub text_in: Option<&'static str>,
    /// The `struct vc_data`.
    #[serde(serialize_with = "address::gva")]
    pub address: Gva,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

/// The virtual consoles that were ever opened. `devices` is asked where the one in front is a graphics card's.
///
/// # Errors
/// If the kernel has none, or its types lack a member.
pub fn consoles(kernel: &Kernel, devices: &DeviceMemory<'_>) -> Result<Listing<Console>, LinuxError> {
    let reader = ConsoleReader::new(kernel, devices)?;
    let space = kernel.space();
    let table = kernel.symbol("vc_cons")?;
    let entry = Structure::of(kernel, "vc")?;
    let data = entry.member("d")?;
    let front = kernel
        .find_symbol(&["fg_console"])
        .and_then(|at| space.read_u32(at).ok());
    let mut out = Listing::default();
    for number in 0..MAX_CONSOLES {
        let slot = table.wrapping_add(number * entry.size());
        match data.pointer(space, slot) {
            Ok(at) if at.is_null() => {}
            Ok(at) => out
                .rows
                .push(reader.console(at, number, front == Some(number as u32))),
            Err(error) => {
                out.warn(format!(
                    "virtual consoles: cut, the table cannot be read: {error}"
                ));
                break;
            }
        }
    }
    Ok(out)
}

struct ConsoleReader<'k> {
    kernel: &'k Kernel,
    devices: &'k DeviceMemory<'k>,
    columns: Member,
    rows: Member,
    row_size: Member,
    origin: Member,
    buffer: Member,
    buffer_size: Member,
    high_font: Member,
    x: Option<Member>,
    y: Option<Member>,
    /// Rows of code points, where anybody asked the kernel to keep them: a structure up to 6.3, then the table itself.
    unicode: Option<Member>,
}

/// What a console holds: its texts and its attributes, row by row.
struct Grid {
    text: Vec<String>,
    attributes: Vec<String>,
}

impl<'k> ConsoleReader<'k> {
    fn new(kernel: &'k Kernel, devices: &'k DeviceMemory<'k>) -> Result<Self, LinuxError> {
        let vc = Structure::of(kernel, "vc_data")?;
        Ok(Self {
            kernel,
            devices,
            columns: vc.member("vc_cols")?,
            rows: vc.member("vc_rows")?,
            row_size: vc.member("vc_size_row")?,
            origin: vc.member("vc_origin")?,
            buffer: vc.member("vc_screenbuf")?,
            buffer_size: vc.member("vc_screenbuf_size")?,
            high_font: vc.member("vc_hi_font_mask")?,
            x: vc.find("state.x|vc_x"),
            y: vc.find("state.y|vc_y"),
            unicode: vc.find("vc_uni_lines|vc_uni_screen"),
        })
    }

    fn console(&self, at: Gva, number: u64, foreground: bool) -> Console {
        let space = self.kernel.space();
        let mut row = Console {
            tty: format!("tty{}", number + 1),
            foreground,
            columns: 0,
            rows: 0,
            cursor: None,
            text: None,
            attributes: Vec::new(),
            text_in: None,
            address: at,
            problems: Vec::new(),
        };
        let cursor = |x: &Option<Member>| x.and_then(|x| x.number(space, at).ok());
        row.cursor = cursor(&self.x).zip(cursor(&self.y));
        match self.grid(at, &mut row) {
            Ok(Some(grid)) => {
                row.text = Some(joined(&grid.text));
                row.attributes = grid.attributes;
            }
            Ok(None) => {}
            Err(error) => row.problems.push(Problem::read("text", &error)),
        }
        row
    }

    /// The cells; `None`, with a problem that says why, where they are elsewhere or cannot be cells.
    fn grid(&self, at: Gva, row: &mut Console) -> Result<Option<Grid>, ReadError> {
        let space = self.kernel.space();
        row.columns = self.columns.number(space, at)?;
        row.rows = self.rows.number(space, at)?;
        let (columns, rows) = (row.columns, row.rows);
        let stride = self.row_size.number(space, at)?;
        let size = self.buffer_size.number(space, at)?;
        let buffer = self.buffer.pointer(space, at)?;
        let possible = (1..=MAX_COLUMNS).contains(&columns)
            && (1..=MAX_COLUMNS).contains(&rows)
            && columns * rows <= MAX_CELLS
            && stride >= columns * 2
            && stride * rows <= MAX_CELLS * 2
            && stride * rows <= size;
        if !possible || buffer.is_null() {
            let reason = format!("{columns} columns and {rows} rows do not fit into its {size} bytes");
            row.problems.push(Problem::new("text", reason));
            return Ok(None);
        }
        let Some(cells) = self.cells(at, buffer, stride * rows, row)? else {
            return Ok(None);
        };
        let high = self.high_font.number(space, at)? as u16;
        let codes = self.codes(at, columns, rows);
        let mut grid = Grid {
            text: Vec::new(),
            attributes: Vec::new(),
        };
        for (nth, line) in cells.chunks_exact(stride as usize).enumerate() {
            let line: Vec<u16> = line
                .chunks_exact(2)
                .take(columns as usize)
                .map(|cell| u16::from_le_bytes(cell.try_into().unwrap_or_default()))
                .collect();
            let known = codes.get(nth).map(Vec::as_slice);
            grid.text.push(text(&line, high, known));
            grid.attributes.push(attributes(&line, high));
        }
        Ok(Some(grid))
    }

    /// The bytes of the cells, out of the kernel's buffer or the graphics card.
    fn cells(
        &self,
        at: Gva,
        buffer: Gva,
        length: u64,
        row: &mut Console,
    ) -> Result<Option<Vec<u8>>, ReadError> {
        let space = self.kernel.space();
        let mut origin = self.origin.pointer(space, at)?;
        if origin == buffer {
            let mut cells = vec![0; length as usize];
            space.read(buffer, &mut cells)?;
            row.text_in = Some("memory");
            return Ok(Some(cells));
        }
        // In text mode a screen scrolls by beginning further down in the window.
        for attempt in 1.. {
            let cells = match vga::cells(self.kernel, self.devices, origin, length) {
                Ok(cells) => cells,
                Err(why) => {
                    let reason = format!("in the memory of the graphics card, which is out of reach: {why}");
                    row.problems.push(Problem::new("text", reason));
                    return Ok(None);
                }
            };
            let before = std::mem::replace(&mut origin, self.origin.pointer(space, at)?);
            if before != origin && attempt < ATTEMPTS {
                continue;
            }
            if before != origin {
                row.problems
                    .push(Problem::new("text", "it scrolled while it was read"));
            }
            row.text_in = Some("device");
            return Ok(Some(cells));
        }
        Ok(None)
    }

    /// The code points of each row, where the kernel keeps them.
    fn codes(&self, at: Gva, columns: u64, rows: u64) -> Vec<Vec<u32>> {
        let space = self.kernel.space();
        let table = self.unicode.and_then(|member| member.pointer(space, at).ok());
        let Some(table) = table.filter(|table| !table.is_null()) else {
            return Vec::new();
        };
        let line = |nth: u64| {
            let at = space.read_u64(table.wrapping_add(nth * 8)).ok()?;
            let mut bytes = vec![0; columns as usize * 4];
            space.read(Gva(at), &mut bytes).ok()?;
            let codes = bytes.chunks_exact(4);
            Some(
                codes
                    .map(|c| u32::from_le_bytes(c.try_into().unwrap_or_default()))
                    .collect(),
            )
        };
        (0..rows).map_while(line).collect()
    }
}

/// The text of a row of cells. A cell holds a glyph's number in the font; the fonts that the kernel starts with are in the order of code
/// page 437, and letters and digits are where they are in ASCII in nearly all.
fn text(cells: &[u16], high: u16, codes: Option<&[u32]>) -> String {
    let mut out = String::with_capacity(cells.len());
    for (nth, &cell) in cells.iter().enumerate() {
        let code = codes.and_then(|codes| codes.get(nth)).copied();
        out.push(match code.and_then(char::from_u32) {
            Some(c) if c != '\0' => c,
            _ if cell & high != 0 => char::REPLACEMENT_CHARACTER,
            _ => glyph(cell as u8),
        });
    }
    out.truncate(out.trim_end_matches(BLANK).len());
    out
}

/// Runs of cells with the same attribute.
fn attributes(cells: &[u16], high: u16) -> String {
    let runs = cells.chunk_by(|a, b| (a & !high) >> 8 == (b & !high) >> 8);
    let parts: Vec<String> = runs
        .map(|run| {
            let attribute = run.first().map_or(0, |cell| (cell & !high) >> 8);
            format!("{attribute:02x}x{}", run.len())
        })
        .collect();
    parts.join(" ")
}

/// The lines without the empty ones at the end.
fn joined(lines: &[String]) -> String {
    let end = lines
        .iter()
        .rposition(|line| !line.is_empty())
        .map_or(0, |last| last + 1);
    lines.get(..end).unwrap_or(&[]).join("\n")
}

/// Code page 437, with the symbols that it has in place of control characters.
const LOW: &str = " \u{263a}\u{263b}\u{2665}\u{2666}\u{2663}\u{2660}\u{2022}\u{25d8}\u{25cb}\u{25d9}\u{2642}\u{2640}\u{266a}\u{266b}\u{263c}\
\u{25ba}\u{25c4}\u{2195}\u{203c}\u{b6}\u{a7}\u{25ac}\u{21a8}\u{2191}\u{2193}\u{2192}\u{2190}\u{221f}\u{2194}\u{25b2}\u{25bc}";
const HIGH: &str = "\u{2302}ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀\
αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u{a0}";

fn glyph(number: u8) -> char {
    let known = match number {
        0x00..=0x1f => LOW.chars().nth(number.into()),
        0x20..=0x7e => Some(number.into()),
        0x7f.. => HIGH.chars().nth(usize::from(number) - 0x7f),
    };
    known.unwrap_or(char::REPLACEMENT_CHARACTER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_glyph_is_a_character_that_steers_nothing() {
        assert_eq!((LOW.chars().count(), HIGH.chars().count()), (32, 129));
        for number in 0..=255u8 {
            let c = glyph(number);
            assert!(!c.is_control() && c != char::REPLACEMENT_CHARACTER, "{number}");
        }
        assert_eq!(
            [glyph(b'A'), glyph(0x81), glyph(0xc4), glyph(0xe1)],
            ['A', 'ü', '─', 'ß']
        );
    }

    #[test]
    fn rows_are_read_by_code_point_where_there_is_one_and_by_glyph_else() {
        let cells = [0x0748, 0x0769, 0x1f81, 0x0720, 0x0720];
        assert_eq!(text(&cells, 0, None), "Hiü");
        assert_eq!(text(&cells, 0, Some(&[0x2603, 0, 0xdddd_dddd])), "\u{2603}iü");
        assert_eq!(attributes(&cells, 0), "07x2 1fx1 07x2");
        // With 512 glyphs a bit of the attribute is the glyph's ninth.
        assert_eq!(text(&[0x0741, 0x0841], 0x0800, None), "A\u{fffd}");
        assert_eq!(attributes(&[0x0741, 0x0f41], 0x0800), "07x2");
        assert_eq!(
            joined(&["".into(), "a".into(), "".into(), "b".into(), "".into()]),
            "\na\n\nb"
        );
        assert_eq!(joined(&[]), "");
    }
}
