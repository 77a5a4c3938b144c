// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * vmsight_poke: does inside a lab guest's kernel what its attackers do, when it is told to, and says what it saw.
 *
 * An ioctl on /dev/vmsight_poke takes a struct poke and gives it back with the answer. What faults is caught by the exception
 * table and told. Whoever asks names the CPU by running on it. The layout is that of `Poke` in workload/src/serve/poke.rs.
 */
#include <linux/errno.h>
#include <linux/fs.h>
#include <linux/irqflags.h>
#include <linux/kernel.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>
#include <asm/asm.h>
#include <asm/desc.h>
#include <asm/pgtable.h>
#include <asm/processor-flags.h>

#define POKE _IOWR('v', 1, struct poke)

enum verb { VERB_WRITE, VERB_READ, VERB_GET, VERB_SET, VERB_CALL };

/* How memory is reached. */
enum how {
	HOW_DIRECT,	/* at its virtual address */
	HOW_WP,		/* there, with CR0.WP clear meanwhile */
	HOW_ALIAS,	/* its physical page, at a writable address made for this */
	HOW_PHYSICAL,	/* the same, by physical address */
};

enum which {
	WHICH_CR0 = 0, WHICH_CR2 = 2, WHICH_CR3 = 3, WHICH_CR4 = 4,
	WHICH_DR0 = 0x10, WHICH_DR1, WHICH_DR2, WHICH_DR3, WHICH_DR6 = 0x16, WHICH_DR7,
	WHICH_XCR0 = 0x20,
	WHICH_IDTR = 0x30,
	WHICH_MSR = 0x100,	/* its number in `number` */
};

struct poke {
	u64 verb;
	u64 how;	/* enum how, or enum which */
	u64 at;		/* an address */
	u64 number;	/* of an MSR */
	u64 width;	/* bytes: 1, 2, 4, 8 */
	u64 restore;	/* afterwards all is as before */
	u64 first;	/* the first value; to set: the bits */
	u64 step;	/* what each is more than the one before; to set: which bits are set */
	u64 count;	/* how often */
	u64 arguments[4];
	u64 old;	/* what was there before, or was read */
	u64 seen;	/* what was there after, or came back */
	u64 made;	/* how often it was done without a fault */
	u64 faults;	/* how often it faulted */
};

/* An instruction that may fault: -EFAULT then, else 0. */
#define MAY_FAULT(instruction, ...)						\
({										\
	int __error = -EFAULT;							\
	asm volatile("1: " instruction "\n\tmovl $0, %[error]\n2:\n"		\
		     _ASM_EXTABLE(1b, 2b)					\
		     : [error] "+&r" (__error) : __VA_ARGS__ : "memory");	\
	__error;								\
})

static int store(void *at, u64 value, u64 width)
{
	switch (width) {
	case 1: return MAY_FAULT("movb %b[value], (%[at])", [value] "q" (value), [at] "r" (at));
	case 2: return MAY_FAULT("movw %w[value], (%[at])", [value] "r" (value), [at] "r" (at));
	case 4: return MAY_FAULT("movl %k[value], (%[at])", [value] "r" (value), [at] "r" (at));
	default: return MAY_FAULT("movq %q[value], (%[at])", [value] "r" (value), [at] "r" (at));
	}
}

#define LOAD(instruction)							\
	asm volatile("1: " instruction "\n\tmovl $0, %[error]\n2:\n"		\
		     _ASM_EXTABLE(1b, 2b)					\
		     : [error] "+&r" (error), [value] "+&r" (loaded) : [at] "r" (at) : "memory")

static int load(void *at, u64 *value, u64 width)
{
	int error = -EFAULT;
	u64 loaded = 0;

	switch (width) {
	case 1: LOAD("movzbl (%[at]), %k[value]"); break;
	case 2: LOAD("movzwl (%[at]), %k[value]"); break;
	case 4: LOAD("movl (%[at]), %k[value]"); break;
	default: LOAD("movq (%[at]), %q[value]"); break;
	}
	*value = loaded;
	return error;
}

static int get_msr(u64 number, u64 *value)
{
	int error = -EFAULT;
	u32 low = 0, high = 0;

	asm volatile("1: rdmsr\n\tmovl $0, %[error]\n2:\n" _ASM_EXTABLE(1b, 2b)
		     : [error] "+&r" (error), "+a" (low), "+d" (high) : "c" ((u32)number) : "memory");
	*value = (u64)high << 32 | low;
	return error;
}

static int get_xcr0(u64 *value)
{
	int error = -EFAULT;
	u32 low = 0, high = 0;

	asm volatile("1: xgetbv\n\tmovl $0, %[error]\n2:\n" _ASM_EXTABLE(1b, 2b)
		     : [error] "+&r" (error), "+a" (low), "+d" (high) : "c" (0) : "memory");
	*value = (u64)high << 32 | low;
	return error;
}

static int get_register(u64 which, u64 number, u64 *value)
{
	struct desc_ptr idtr;

	*value = 0;
	switch (which) {
	case WHICH_CR0: asm volatile("mov %%cr0, %0" : "=r" (*value)); return 0;
	case WHICH_CR2: asm volatile("mov %%cr2, %0" : "=r" (*value)); return 0;
	case WHICH_CR3: asm volatile("mov %%cr3, %0" : "=r" (*value)); return 0;
	case WHICH_CR4: asm volatile("mov %%cr4, %0" : "=r" (*value)); return 0;
	case WHICH_DR0: asm volatile("mov %%db0, %0" : "=r" (*value)); return 0;
	case WHICH_DR1: asm volatile("mov %%db1, %0" : "=r" (*value)); return 0;
	case WHICH_DR2: asm volatile("mov %%db2, %0" : "=r" (*value)); return 0;
	case WHICH_DR3: asm volatile("mov %%db3, %0" : "=r" (*value)); return 0;
	case WHICH_DR6: asm volatile("mov %%db6, %0" : "=r" (*value)); return 0;
	case WHICH_DR7: asm volatile("mov %%db7, %0" : "=r" (*value)); return 0;
	case WHICH_XCR0: return get_xcr0(value);
	case WHICH_IDTR:
		asm volatile("sidt %0" : "=m" (idtr));
		*value = idtr.address;
		return 0;
	case WHICH_MSR: return get_msr(number, value);
	default: return -EINVAL;
	}
}

/* With the kernel's own helpers some of these would be refused, or put right again: that is not what attackers use. */
static int set_register(u64 which, u64 number, u64 value)
{
	u32 low = value, high = value >> 32;
	struct desc_ptr idtr;

	switch (which) {
	case WHICH_CR0: return MAY_FAULT("mov %[value], %%cr0", [value] "r" (value));
	case WHICH_CR2: return MAY_FAULT("mov %[value], %%cr2", [value] "r" (value));
	case WHICH_CR3: return MAY_FAULT("mov %[value], %%cr3", [value] "r" (value));
	case WHICH_CR4: return MAY_FAULT("mov %[value], %%cr4", [value] "r" (value));
	case WHICH_DR0: return MAY_FAULT("mov %[value], %%db0", [value] "r" (value));
	case WHICH_DR1: return MAY_FAULT("mov %[value], %%db1", [value] "r" (value));
	case WHICH_DR2: return MAY_FAULT("mov %[value], %%db2", [value] "r" (value));
	case WHICH_DR3: return MAY_FAULT("mov %[value], %%db3", [value] "r" (value));
	case WHICH_DR6: return MAY_FAULT("mov %[value], %%db6", [value] "r" (value));
	case WHICH_DR7: return MAY_FAULT("mov %[value], %%db7", [value] "r" (value));
	case WHICH_XCR0: return MAY_FAULT("xsetbv", "c" (0), "a" (low), "d" (high));
	case WHICH_IDTR:
		asm volatile("sidt %0" : "=m" (idtr));
		idtr.address = value;
		return MAY_FAULT("lidt %[idtr]", [idtr] "m" (idtr));
	case WHICH_MSR: return MAY_FAULT("wrmsr", "c" ((u32)number), "a" (low), "d" (high));
	default: return -EINVAL;
	}
}

/* A writable address of our own for the page at a virtual or physical address, to be given back with vunmap(). */
static void *alias(u64 at, bool physical)
{
	unsigned int level;
	struct page *page;

	if (!physical) {
		pte_t *entry = lookup_address(at, &level);

		if (!entry || !pte_present(*entry))
			return NULL;
		at = slow_virt_to_phys((void *)at);
	}
	if (!pfn_valid(at >> PAGE_SHIFT))
		return NULL;
	page = pfn_to_page(at >> PAGE_SHIFT);
	return vmap(&page, 1, VM_MAP, PAGE_KERNEL);
}

static void write_all(struct poke *poke, void *at)
{
	u64 mask = poke->width == 8 ? ~0ull : (1ull << poke->width * 8) - 1;
	u64 value = poke->first & mask, n;

	if (load(at, &poke->old, poke->width)) {
		poke->faults++;
		return;
	}
	for (n = 0; n < poke->count; n++) {
		value = (poke->first + poke->step * n) & mask;
		if (store(at, value, poke->width))
			poke->faults++;
		else
			poke->made++;
	}
	load(at, &poke->seen, poke->width);
	if (poke->restore && poke->seen != poke->old)
		store(at, poke->old, poke->width);
}

static void read_all(struct poke *poke, void *at)
{
	u64 n;

	for (n = 0; n < poke->count; n++) {
		if (load(at, &poke->old, poke->width)) {
			poke->faults++;
		} else {
			poke->made++;
			poke->seen += poke->old;
		}
	}
}

static long memory(struct poke *poke)
{
	void (*work)(struct poke *, void *) = poke->verb == VERB_WRITE ? write_all : read_all;
	void *at = (void *)poke->at, *page = NULL;
	unsigned long flags;
	u64 cr0;

	if (!is_power_of_2(poke->width) || poke->width > 8 || poke->at % poke->width)
		return -EINVAL;
	switch (poke->how) {
	case HOW_DIRECT:
		work(poke, at);
		return 0;
	case HOW_WP:
		/* A long sequence is long with interrupts off. */
		if (poke->count > 100000)
			return -EINVAL;
		local_irq_save(flags);
		get_register(WHICH_CR0, 0, &cr0);
		set_register(WHICH_CR0, 0, cr0 & ~(u64)X86_CR0_WP);
		work(poke, at);
		set_register(WHICH_CR0, 0, cr0);
		local_irq_restore(flags);
		return 0;
	case HOW_ALIAS:
	case HOW_PHYSICAL:
		page = alias(poke->at & PAGE_MASK, poke->how == HOW_PHYSICAL);
		if (!page)
			return -EFAULT;
		work(poke, page + offset_in_page(poke->at));
		vunmap(page);
		return 0;
	default:
		return -EINVAL;
	}
}

static long registers(struct poke *poke)
{
	unsigned long flags;
	long error;
	u64 value, n;

	/* Nothing else runs on this CPU between the change and what is seen of it. */
	local_irq_save(flags);
	error = get_register(poke->how, poke->number, &poke->old);
	if (!error && poke->verb == VERB_SET) {
		value = (poke->old & ~poke->step) | (poke->first & poke->step);
		for (n = 0; n < poke->count && n < 100000; n++) {
			if (set_register(poke->how, poke->number, value))
				poke->faults++;
			else
				poke->made++;
		}
		get_register(poke->how, poke->number, &poke->seen);
		if (poke->restore && poke->seen != poke->old)
			set_register(poke->how, poke->number, poke->old);
	}
	local_irq_restore(flags);
	if (error == -EFAULT) {
		poke->faults++;
		error = 0;
	} else if (poke->verb == VERB_GET) {
		poke->made++;
	}
	return error;
}

static long call(struct poke *poke)
{
	u64 (*function)(u64, u64, u64, u64) = (void *)poke->at;
	const u64 *a = poke->arguments;

	for (; poke->made < poke->count; poke->made++)
		poke->seen = function(a[0], a[1], a[2], a[3]);
	return 0;
}

static long poke_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	void __user *user = (void __user *)argument;
	struct poke poke;
	long error;

	if (command != POKE)
		return -ENOTTY;
	if (copy_from_user(&poke, user, sizeof(poke)))
		return -EFAULT;
	poke.old = poke.seen = poke.made = poke.faults = 0;
	switch (poke.verb) {
	case VERB_WRITE:
	case VERB_READ:
		error = memory(&poke);
		break;
	case VERB_GET:
	case VERB_SET:
		error = registers(&poke);
		break;
	case VERB_CALL:
		error = call(&poke);
		break;
	default:
		error = -EINVAL;
	}
	if (!error && copy_to_user(user, &poke, sizeof(poke)))
		error = -EFAULT;
	return error;
}

static const struct file_operations poke_operations = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = poke_ioctl,
};

static struct miscdevice poke_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "vmsight_poke",
	.fops = &poke_operations,
	.mode = 0600,
};

module_misc_device(poke_device);

MODULE_DESCRIPTION("Does in a lab guest's kernel what attackers do");
MODULE_LICENSE("Dual MIT/GPL");
