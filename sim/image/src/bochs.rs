//! Running an image in Bochs, headless.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::error::io;
use crate::screen::{self, Screen};
use crate::{Channel, Error, Image, packages};

/// The processor of the machine, as Bochs calls it.
pub const WITH_VMX: &str = "corei7_skylake_x";
/// One that has the monitor trap flag, too.
pub const WITH_TRAP_FLAG: &str = "corei7_icelake_u";
/// One with VT-x but without VMFUNC.
pub const WITHOUT_VMFUNC: &str = "corei7_sandy_bridge_2600k";
/// One with long mode but without VT-x.
pub const WITHOUT_VMX: &str = "athlon64_clawhammer";

/// What the hypervisor says last when there is no guest.
pub const HALTED: &str = "vmsight-hypervisor: halted";

/// What GRUB says when it could not do what it was to do, and asks.
const PROMPT: &str = "grub>";

const BIOS: &str = "/usr/share/bochs/BIOS-bochs-latest";
const VGA_BIOS: &str = "/usr/share/bochs/VGABIOS-lgpl-latest";

/// How often it is looked whether there is more to read.
const PERIOD: Duration = Duration::from_millis(200);

/// What the machine is like.
#[derive(Debug, Clone)]
pub struct Hardware {
    /// Bochs's name of the processor.
    pub processor: String,
    /// How many there are.
    pub processors: u32,
    /// Memory in MiB.
    pub memory: u32,
    /// A command that becomes Bochs, given as the rest of its arguments: for those who want it to end with them.
    pub through: Vec<OsString>,
}

impl Default for Hardware {
    /// One processor with VT-x, 256 MiB.
    fn default() -> Self {
        Self {
            processor: WITH_VMX.to_owned(),
            processors: 1,
            memory: 256,
            through: Vec::new(),
        }
    }
}

/// A machine with one disc. It ends when this is dropped.
#[derive(Debug)]
pub struct Machine {
    folder: TempDir,
    process: Child,
    console: Tail,
    channel: Channel,
    screen: Screen,
    /// Bytes of the channel that were given out.
    told: usize,
    seen: Vec<u8>,
}

/// What a running machine has said since it was asked last.
#[derive(Debug)]
pub struct News {
    /// Over the first serial port: the hypervisor's console and the guest's.
    pub console: Vec<u8>,
    /// Over the second: the hypervisor's lines, if it has a policy.
    pub channel: Vec<u8>,
    /// Whether the machine was switched off; nothing comes any more.
    pub is_off: bool,
}

/// How a run ended, and what came over the serial port.
#[derive(Debug)]
pub struct Run {
    /// Whether the machine was switched off.
    pub off: bool,
    /// The serial port's output. Bytes that are no UTF-8 are replaced.
    pub serial: String,
    /// The second serial port's: the hypervisor's lines, if it has a policy.
    pub channel: String,
}

impl Machine {
    /// Starts an image.
    ///
    /// # Errors
    /// Those of [`Image::write`] and [`Machine::boot`].
    pub fn start(image: &Image, processor: &str) -> Result<Self, Error> {
        Self::with_processors(image, processor, 1)
    }

    /// The same with more than one processor.
    ///
    /// # Errors
    /// Those of [`Image::write`] and [`Machine::boot`].
    pub fn with_processors(image: &Image, processor: &str, count: u32) -> Result<Self, Error> {
        let hardware = Hardware {
            processor: processor.to_owned(),
            processors: count,
            ..Hardware::default()
        };
        Self::new(image, &hardware)
    }

    /// Starts an image on this hardware.
    ///
    /// # Errors
    /// Those of [`Image::write`] and [`Machine::boot`].
    pub fn new(image: &Image, hardware: &Hardware) -> Result<Self, Error> {
        let folder = folder()?;
        let disc = folder.path().join("image.iso");
        installed()?;
        image.write(&disc)?;
        Self::launch(folder, &disc, hardware)
    }

    /// Starts from a disc's image that is there already.
    ///
    /// # Errors
    /// [`Error::NotInstalled`] where Bochs or what it needs is missing, and what the system says.
    pub fn boot(disc: &Path, hardware: &Hardware) -> Result<Self, Error> {
        installed()?;
        let disc = disc.canonicalize().map_err(io("find", disc))?;
        Self::launch(folder()?, &disc, hardware)
    }

    fn launch(folder: TempDir, disc: &Path, hardware: &Hardware) -> Result<Self, Error> {
        let put = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::write(&path, text).map_err(io("write", path.clone()))
        };
        let channel = Channel::listen()?;
        put("bochsrc", &configuration(disc, hardware, channel.port()))?;
        // Debian's Bochs has its debugger in, which asks before it starts and after each reset.
        put("commands", &"c\n".repeat(8))?;
        let said = folder.path().join("output");
        let output = File::create(&said).map_err(io("write", said.clone()))?;
        let mut words = hardware.through.clone();
        words.extend(["nice", "bochs", "-q", "-f", "bochsrc", "-rc", "commands"].map(OsString::from));
        let mut words = words.iter();
        let mut command = Command::new(words.next().map_or("bochs".as_ref(), OsString::as_os_str));
        command.args(words).current_dir(folder.path()).stderr(output);
        let screen = Screen::attach(&mut command)?;
        let process = command.spawn().map_err(io("run", "bochs"))?;
        screen.follow(said);
        // Its end of the terminal is Bochs's alone.
        drop(command);
        Ok(Self {
            console: Tail::new(folder.path().join("serial")),
            channel,
            screen,
            told: 0,
            folder,
            process,
            seen: Vec::new(),
        })
    }

    /// The line to the hypervisor.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// What has come since this was asked last, and whether the machine still runs.
    ///
    /// # Errors
    /// [`Error::Failed`] with what Bochs said, if it ended before the machine said anything.
    pub fn look(&mut self) -> Result<News, Error> {
        // Asked first: what is read after its end is all there is.
        let ended = self
            .process
            .try_wait()
            .map_err(io("wait for", "bochs"))?
            .is_some();
        if ended {
            self.channel.settle();
        }
        let news = News {
            console: self.console.read()?,
            channel: self.channel.after(self.told),
            is_off: ended,
        };
        self.told += news.channel.len();
        self.seen.extend_from_slice(&news.console);
        if ended && self.seen.is_empty() {
            let output = fs::read(self.folder.path().join("output")).unwrap_or_default();
            return Err(Error::Failed {
                program: "bochs",
                output: last_message(&String::from_utf8_lossy(&output)).to_owned(),
            });
        }
        Ok(news)
    }

    /// All that has come over the first serial port by now. Bytes that are no UTF-8 are replaced.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn serial(&self) -> Result<String, Error> {
        let all = Tail::new(self.console.path.clone()).read()?;
        Ok(String::from_utf8_lossy(&all).into_owned())
    }

    /// The last that was drawn on the screen, as a terminal gets it: letters between codes that move its cursor.
    pub fn screen(&self) -> String {
        self.screen.text()
    }

    /// What was read of it so far.
    fn said(&self) -> String {
        String::from_utf8_lossy(&self.seen).into_owned()
    }

    /// Whether there will be no guest: the hypervisor, or GRUB before it, has said so.
    pub fn is_halted(&self) -> bool {
        let last = self.seen.len().saturating_sub(256);
        let last = String::from_utf8_lossy(self.seen.get(last..).unwrap_or_default());
        last.contains(HALTED) || last.trim_end().ends_with(PROMPT)
    }

    /// Waits until the machine is switched off, or there is no guest, or `limit` is over.
    ///
    /// # Errors
    /// Those of [`Machine::look`].
    pub fn wait(self, limit: Duration) -> Result<Run, Error> {
        self.watch(limit, |_| true)
    }

    /// The same; `each` gets what came, every fifth of a second, and may end it by saying no.
    ///
    /// # Errors
    /// Those of [`Machine::look`].
    pub fn watch(mut self, limit: Duration, mut each: impl FnMut(&News) -> bool) -> Result<Run, Error> {
        let deadline = Instant::now() + limit;
        loop {
            let news = self.look()?;
            let on = each(&news);
            if news.is_off || !on || self.is_halted() || Instant::now() > deadline {
                return Ok(Run {
                    off: news.is_off,
                    serial: self.said(),
                    channel: self.channel.text(),
                });
            }
            std::thread::sleep(PERIOD);
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended already; then there is nothing to do.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A file that another process writes, read as it grows.
#[derive(Debug)]
struct Tail {
    path: PathBuf,
    done: u64,
}

impl Tail {
    fn new(path: PathBuf) -> Self {
        Self { path, done: 0 }
    }

    /// What is new in it; nothing while it is not there.
    fn read(&mut self) -> Result<Vec<u8>, Error> {
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io("open", &self.path)(error)),
        };
        let mut new = Vec::new();
        file.seek(SeekFrom::Start(self.done))
            .and_then(|_| file.read_to_end(&mut new))
            .map_err(io("read", &self.path))?;
        self.done += new.len() as u64;
        Ok(new)
    }
}

/// Why there is no guest, where the hypervisor or GRUB has said so in a console's output.
pub fn refusal(console: &str) -> Option<&str> {
    if let Some((before, _)) = console.rsplit_once(HALTED) {
        let why = before.trim_end().lines().next_back()?;
        return Some(why.strip_prefix("vmsight-hypervisor: ").unwrap_or(why));
    }
    if !console.trim_end().ends_with(PROMPT) {
        return None;
    }
    let error = console
        .split_once("error: ")
        .and_then(|(_, why)| why.lines().next());
    Some(error.unwrap_or("GRUB did not find the hypervisor"))
}

/// Why Bochs ended, out of all that it says on standard error.
fn last_message(output: &str) -> &str {
    let message = output
        .rsplit_once("Bochs is exiting with the following message:\n")
        .and_then(|(_, rest)| rest.split("\n====").next());
    message.unwrap_or(output).trim()
}

fn folder() -> Result<TempDir, Error> {
    tempfile::tempdir().map_err(io("make a temporary folder in", std::env::temp_dir()))
}

/// Whether Bochs is there with what it needs.
fn installed() -> Result<(), Error> {
    let missing = |program| Error::NotInstalled {
        program,
        packages: "bochs, bochs-term, bochsbios and vgabios",
    };
    if packages::find("bochs").is_none() {
        return Err(missing("bochs"));
    }
    for file in [BIOS, VGA_BIOS, screen::PLUGIN] {
        if !Path::new(file).is_file() {
            return Err(missing(file));
        }
    }
    Ok(())
}

fn configuration(disc: &Path, hardware: &Hardware, port: u16) -> String {
    let Hardware {
        processor,
        processors,
        memory,
        ..
    } = hardware;
    format!(
        "megs: {memory}\n\
         romimage: file={BIOS}\n\
         vgaromimage: file={VGA_BIOS}\n\
         cpu: model={processor}, count={processors}, ips=50000000, reset_on_triple_fault=1\n\
         plugin_ctrl: unmapped=1, biosdev=1, speaker=0, extfpuirq=0, gameport=0\n\
         display_library: term\n\
         com1: enabled=1, mode=file, dev=serial\n\
         com2: enabled=1, mode=socket-client, dev=127.0.0.1:{port}\n\
         ata0-master: type=cdrom, path=\"{}\", status=inserted\n\
         boot: cdrom\n\
         log: log\n\
         panic: action=fatal\n\
         error: action=ignore\n\
         info: action=ignore\n\
         debug: action=ignore\n\
         clock: sync=none\n",
        disc.display()
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::Write;

    use super::*;

    #[test]
    fn why_there_is_no_guest_is_found() {
        let console = "\x1b[Hvmsight-hypervisor 0.1.0\r\n\
            vmsight-hypervisor: this processor lacks VT-x\r\nvmsight-hypervisor: halted\r\n";
        assert_eq!(refusal(console), Some("this processor lacks VT-x"));
        let console = "\x1b[1;1Herror: out of memory.\r\n\x1b[HGNU GRUB  version 2.06\r\n\r\ngrub> ";
        assert_eq!(refusal(console), Some("out of memory."));
        assert_eq!(refusal("vmsight-hypervisor: kernel at 0x1000000\r\n"), None);
    }

    #[test]
    fn why_bochs_ended_is_found() {
        let output = "00000000000i[PLUGIN] loaded plugin libbx_serial.so\n========\n\
            Bochs is exiting with the following message:\n[BIOS  ] No bootable device.\n========\n0i[SIM   ] quit_sim\n";
        assert_eq!(last_message(output), "[BIOS  ] No bootable device.");
        assert_eq!(last_message("nice: bochs: not there\n"), "nice: bochs: not there");
    }

    #[test]
    fn a_file_that_grows_is_read_once() {
        let folder = folder().unwrap();
        let path = folder.path().join("serial");
        let mut tail = Tail::new(path.clone());
        assert!(tail.read().unwrap().is_empty());
        let mut file = File::create(&path).unwrap();
        file.write_all(b"one").unwrap();
        assert_eq!(tail.read().unwrap(), b"one");
        file.write_all(b"two").unwrap();
        assert_eq!(tail.read().unwrap(), b"two");
        assert!(tail.read().unwrap().is_empty());
    }
}
