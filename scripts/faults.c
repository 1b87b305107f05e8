/* Loaded before the C library (LD_PRELOAD), makes writes to files below one folder fail, and the clock jump.

   cc -shared -fPIC -O1 -o faults.so scripts/faults.c -ldl

   fault_set(folder, first, every, error): the first-th write (from 1) below `folder` fails with `error`; after it each
   every-th one too (0: no other; 1: all that follow, as on a full disk). fault_writes(): how many writes there were.
   fault_clock(seconds): what the clock of the day shows is that much off from now on. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long first, every, count, shift;
static int error;

void fault_set(const char *below, long nth, long each, int code) {
  strncpy(folder, below, sizeof folder - 1);
  first = nth, every = each, error = code, count = 0;
}
long fault_writes(void) { return count; }
void fault_clock(long seconds) { shift = seconds; }

static int fails(int file) {
  char name[64], path[PATH_MAX];
  ssize_t length;
  if (!folder[0]) return 0;
  snprintf(name, sizeof name, "/proc/self/fd/%d", file);
  length = readlink(name, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  if (strncmp(path, folder, strlen(folder))) return 0;
  long number = __sync_add_and_fetch(&count, 1);
  if (!first || number < first || (number > first && (!every || (number - first) % every))) return 0;
  errno = error;
  return 1;
}

#define NEXT(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int file, const void *data, size_t size) { return fails(file) ? -1 : NEXT(write)(file, data, size); }
ssize_t writev(int file, const struct iovec *v, int n) { return fails(file) ? -1 : NEXT(writev)(file, v, n); }
ssize_t pwrite64(int file, const void *d, size_t s, off64_t o) { return fails(file) ? -1 : NEXT(pwrite64)(file, d, s, o); }
int fsync(int file) { return fails(file) ? -1 : NEXT(fsync)(file); }

int clock_gettime(clockid_t clock, struct timespec *now) {
  int failed = NEXT(clock_gettime)(clock, now);
  if (clock == CLOCK_REALTIME) now->tv_sec += shift;
  return failed;
}
