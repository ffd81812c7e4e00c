/* Answers each cpuid that hold_to_avx2.py made a ud2, as a CPU with AVX2 and nothing newer would. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <string.h>
#include <ucontext.h>

static void answer(int number, siginfo_t *info, void *context)
{
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    unsigned leaf = registers[REG_RAX], part = registers[REG_RCX], a, b, c, d;
    (void)info;
    if (memcmp((void *)registers[REG_RIP], "\x0f\x0b", 2)) { /* truly illegal: let it end the process */
        signal(number, SIG_DFL);
        return;
    }
    __cpuid_count(leaf, part, a, b, c, d);
    if (leaf == 7) { /* all that came with AVX2 or later; AVX, FMA and F16C are in leaf 1 */
        a = c = d = 0;
        b = part ? 0 : b & (bit_AVX2 | bit_BMI | bit_BMI2);
    }
    registers[REG_RAX] = a;
    registers[REG_RBX] = b;
    registers[REG_RCX] = c;
    registers[REG_RDX] = d;
    registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void hold(void)
{
    struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO};
    sigaction(SIGILL, &action, NULL);
}
