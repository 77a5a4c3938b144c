//! Basic exit reasons (SDM vol. 3, appendix C).

macro_rules! reasons {
    ($($name:ident = $number:literal, $text:literal;)*) => {
        $(#[doc = $text] pub const $name: u16 = $number;)*

        /// What an exit reason is called.
        pub fn name(reason: u16) -> &'static str {
            match reason {
                $($number => $text,)*
                _ => "another reason",
            }
        }
    };
}

/// Reasons are below this.
pub const COUNT: usize = 80;

reasons! {
    EXCEPTION_OR_NMI = 0, "exception or NMI";
    EXTERNAL_INTERRUPT = 1, "external interrupt";
    TRIPLE_FAULT = 2, "triple fault";
    INIT = 3, "INIT";
    SIPI = 4, "SIPI";
    NMI_WINDOW = 8, "NMI window";
    TASK_SWITCH = 9, "task switch";
    CPUID = 10, "CPUID";
    GETSEC = 11, "GETSEC";
    INVD = 13, "INVD";
    VMCALL = 18, "VMCALL";
    VMCLEAR = 19, "VMCLEAR";
    VMXON = 27, "VMXON";
    CONTROL_REGISTER = 28, "control register";
    IO_INSTRUCTION = 30, "I/O instruction";
    RDMSR = 31, "RDMSR";
    WRMSR = 32, "WRMSR";
    INVALID_GUEST_STATE = 33, "invalid guest state";
    MONITOR_TRAP = 37, "monitor trap flag";
    EPT_VIOLATION = 48, "EPT violation";
    EPT_MISCONFIGURATION = 49, "EPT misconfiguration";
    INVEPT = 50, "INVEPT";
    PREEMPTION_TIMER = 52, "preemption timer";
    INVVPID = 53, "INVVPID";
    WBINVD = 54, "WBINVD";
    XSETBV = 55, "XSETBV";
    VMFUNC = 59, "VMFUNC";
}

/// Whether a reason is an instruction of VMX or SMX, which the guest is told that it does not have.
pub fn is_hidden_instruction(reason: u16) -> bool {
    matches!(reason, GETSEC | VMCLEAR..=VMXON | INVEPT | INVVPID)
}
