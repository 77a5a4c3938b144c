//! Names of keys and buttons (include/uapi/linux/input-event-codes.h).

/// Keys by their codes, from 1 on, without `KEY_`.
#[rustfmt::skip]
const KEYS: [&str; 127] = [
    "ESC", "1", "2", "3", "4", "5", "6", "7", "8", "9", "0", "MINUS", "EQUAL", "BACKSPACE", "TAB", "Q", "W", "E",
    "R", "T", "Y", "U", "I", "O", "P", "LEFTBRACE", "RIGHTBRACE", "ENTER", "LEFTCTRL", "A", "S", "D", "F", "G", "H",
    "J", "K", "L", "SEMICOLON", "APOSTROPHE", "GRAVE", "LEFTSHIFT", "BACKSLASH", "Z", "X", "C", "V", "B", "N", "M",
    "COMMA", "DOT", "SLASH", "RIGHTSHIFT", "KPASTERISK", "LEFTALT", "SPACE", "CAPSLOCK", "F1", "F2", "F3", "F4",
    "F5", "F6", "F7", "F8", "F9", "F10", "NUMLOCK", "SCROLLLOCK", "KP7", "KP8", "KP9", "KPMINUS", "KP4", "KP5",
    "KP6", "KPPLUS", "KP1", "KP2", "KP3", "KP0", "KPDOT", "", "ZENKAKUHANKAKU", "102ND", "F11", "F12", "RO",
    "KATAKANA", "HIRAGANA", "HENKAN", "KATAKANAHIRAGANA", "MUHENKAN", "KPJPCOMMA", "KPENTER", "RIGHTCTRL",
    "KPSLASH", "SYSRQ", "RIGHTALT", "LINEFEED", "HOME", "UP", "PAGEUP", "LEFT", "RIGHT", "END", "DOWN", "PAGEDOWN",
    "INSERT", "DELETE", "MACRO", "MUTE", "VOLUMEDOWN", "VOLUMEUP", "POWER", "KPEQUAL", "KPPLUSMINUS", "PAUSE",
    "SCALE", "KPCOMMA", "HANGEUL", "HANJA", "YEN", "LEFTMETA", "RIGHTMETA", "COMPOSE",
];
/// Buttons of a mouse, from `BTN_LEFT` on, without `BTN_`.
const BUTTONS: [&str; 8] = [
    "LEFT", "RIGHT", "MIDDLE", "SIDE", "EXTRA", "FORWARD", "BACK", "TASK",
];
const BTN_LEFT: u16 = 0x110;

/// A key's name as in the header, or `KEY_` and its code in hex.
pub(super) fn name(code: u16) -> String {
    let of = |table: &'static [&'static str], first: u16| {
        let nth = usize::from(code.checked_sub(first)?);
        table.get(nth).copied().filter(|name| !name.is_empty())
    };
    if let Some(name) = of(&KEYS, 1) {
        return format!("KEY_{name}");
    }
    match of(&BUTTONS, BTN_LEFT) {
        Some(name) => format!("BTN_{name}"),
        None => format!("KEY_{code:#x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::name;

    #[test]
    fn keys_have_the_names_that_the_header_gives_them() {
        let known = [
            (1, "KEY_ESC"),
            (28, "KEY_ENTER"),
            (30, "KEY_A"),
            (42, "KEY_LEFTSHIFT"),
            (57, "KEY_SPACE"),
            (83, "KEY_KPDOT"),
            (85, "KEY_ZENKAKUHANKAKU"),
            (103, "KEY_UP"),
            (127, "KEY_COMPOSE"),
            (0x110, "BTN_LEFT"),
            (0x117, "BTN_TASK"),
            (0, "KEY_0x0"),
            (84, "KEY_0x54"),
            (0x118, "KEY_0x118"),
            (u16::MAX, "KEY_0xffff"),
        ];
        for (code, expected) in known {
            assert_eq!(name(code), expected);
        }
    }
}
